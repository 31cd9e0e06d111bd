"""One block of ChatGLM: bidirectional-context attention and a GELU network, with scaled residuals around norms.

Shape suffixes: B rows, T tokens, S key slots (cached, then T), D hidden size, H heads, K head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_layers import GradientCheckpointingLayer

from hpc.model.chatglm.configuration import ChatGLMConfig
from hpc.model.chatglm.rotary import RotaryFrequencies, rotate

# sqrt(2 · blocks) of the 28 published blocks; the published code takes 28 whatever the configuration says.
ALPHA = math.sqrt(2 * 28)
Rotation = tuple[torch.Tensor, torch.Tensor]


class ChatGLMAttention(nn.Module):
    """Attention of one block. `layer_idx` addresses the cache; `depth` scales the scores."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.depth = layer_idx + 1  # of the whole model: stays when a part of a cut one renumbers its blocks
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.head_size = config.hidden_size // config.num_attention_heads
        self.rotary_emb = RotaryFrequencies(self.head_size)
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_BTD: torch.Tensor, rotation: Rotation, allowed_B1TS: torch.Tensor | None, cache: Any
    ) -> torch.Tensor:
        # Per head: its query, its key, its value.
        fused_BTHK = self.query_key_value(hidden_BTD).unflatten(-1, (self.heads, 3 * self.head_size))
        query_BHTK, key_BHSK, value_BHSK = fused_BTHK.transpose(1, 2).chunk(3, -1)
        query_BHTK, key_BHSK = rotate(query_BHTK, rotation), rotate(key_BHSK, rotation)
        if cache is not None:
            key_BHSK, value_BHSK = cache.update(key_BHSK, value_BHSK, self.layer_idx)
        if self.config._attn_implementation == "sdpa":
            mixed_BHTK = functional.scaled_dot_product_attention(query_BHTK, key_BHSK, value_BHSK, allowed_B1TS)
        else:
            mixed_BHTK = attend(query_BHTK, key_BHSK, value_BHSK, allowed_B1TS, depth=self.depth)
        return self.dense(mixed_BHTK.transpose(1, 2).flatten(2))


def attend(
    query_BHTK: torch.Tensor,
    key_BHSK: torch.Tensor,
    value_BHSK: torch.Tensor,
    allowed_B1TS: torch.Tensor | None,
    *,
    depth: int,
) -> torch.Tensor:
    """Attention as the published code computes it (`attn_implementation="eager"`).

    Queries are divided by the block's depth, and the scores multiplied by it again in float32 before the softmax:
    so half-precision scores of deep blocks do not overflow.
    """
    query_BHTK = query_BHTK / (math.sqrt(query_BHTK.shape[-1]) * depth)
    score_BHTS = (query_BHTK @ key_BHSK.transpose(-1, -2)).float() * depth
    if allowed_B1TS is not None:
        score_BHTS = score_BHTS.masked_fill(~allowed_B1TS, -torch.inf)
    return score_BHTS.softmax(-1).to(value_BHSK.dtype) @ value_BHSK


class ChatGLMMLP(nn.Module):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(hidden_BTD), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """`hidden_states` in and out, `_BTD`. The residual is the normed input times `ALPHA`."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.number = layer_idx  # in the whole model, as `ChatGLMAttention.depth`
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        rotation: Rotation,
        allowed_B1TS: torch.Tensor | None = None,
        past_key_values: Any = None,
    ) -> torch.Tensor:
        """`rotation`: cosine and sine `_B1TK`. `allowed_B1TS`: bool; None: everything is seen."""
        normed_BTD = self.input_layernorm(hidden_states)
        attended_BTD = self.attention(normed_BTD, rotation, allowed_B1TS, past_key_values)
        normed_BTD = self.post_attention_layernorm(normed_BTD * ALPHA + attended_BTD)
        return normed_BTD * ALPHA + self.mlp(normed_BTD)
