"""Small random models of many families, each with what makes it hard to cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

BLOCKS, VOCABULARY = 5, 61
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = COMMON | {"num_key_value_heads": 2, "intermediate_size": 48}
MHA = COMMON | {"intermediate_size": 48}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": BLOCKS,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@dataclass(kw_only=True, frozen=True)
class Family:
    """How to make the model, and what plain PEFT has to be told about it."""

    config: Callable[[], Any]
    kv_shape: tuple[int, int] = (2, 8)
    """KV heads, values per head."""
    lora_targets: str | list[str] = "all-linear"
    """PEFT's name for what we train by default: every linear layer of the blocks."""


FAMILIES: dict[str, Family] = {
    "llama": Family(config=lambda: hf.LlamaConfig(**GQA, attention_bias=True)),
    "mistral": Family(config=lambda: hf.MistralConfig(**GQA, sliding_window=4)),
    "qwen2": Family(
        config=lambda: hf.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    ),
    "qwen3": Family(kv_shape=(2, 16), config=lambda: hf.Qwen3Config(**GQA, head_dim=16, tie_word_embeddings=True)),
    "gemma2": Family(
        kv_shape=(2, 16),
        config=lambda: hf.Gemma2Config(
            **GQA, head_dim=16, sliding_window=4, layer_types=MIXED, query_pre_attn_scalar=8
        ),
    ),
    "gemma3": Family(
        kv_shape=(2, 16),
        config=lambda: hf.Gemma3TextConfig(
            **GQA, head_dim=16, sliding_window=4, layer_types=MIXED, query_pre_attn_scalar=8
        ),
    ),
    "phi3": Family(config=lambda: hf.Phi3Config(**GQA, sliding_window=4)),
    "gpt2": Family(kv_shape=(4, 8), config=lambda: hf.GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True)),
    "gpt_neox": Family(kv_shape=(4, 8), config=lambda: hf.GPTNeoXConfig(**MHA, rotary_pct=0.5)),
    "gpt_bigcode": Family(kv_shape=(1, 8), config=lambda: hf.GPTBigCodeConfig(**GPT, multi_query=True)),
    "opt": Family(
        kv_shape=(4, 8), config=lambda: hf.OPTConfig(**COMMON, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    ),
    "opt_projected": Family(
        kv_shape=(4, 8),
        config=lambda: hf.OPTConfig(
            **COMMON, ffn_dim=48, word_embed_proj_dim=16, do_layer_norm_before=False, dropout=0.0
        ),
    ),
    "opt_post_norm": Family(
        kv_shape=(4, 8),
        config=lambda: hf.OPTConfig(
            **COMMON, ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=False, dropout=0.0
        ),
    ),
    "bloom": Family(
        kv_shape=(4, 8),
        config=lambda: hf.BloomConfig(**{k: v for k, v in COMMON.items() if k != "num_attention_heads"}, n_head=4),
    ),
    "falcon": Family(
        kv_shape=(1, 8),
        config=lambda: hf.FalconConfig(**COMMON, alibi=True, multi_query=True, bias=True, parallel_attn=False),
    ),
    "falcon_new": Family(
        kv_shape=(4, 8),
        config=lambda: hf.FalconConfig(**COMMON, alibi=False, new_decoder_architecture=True, num_kv_heads=2),
    ),
    "mpt": Family(
        kv_shape=(4, 8),
        config=lambda: hf.MptConfig(
            d_model=32,
            n_heads=4,
            n_layers=BLOCKS,
            max_seq_len=64,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            eos_token_id=None,
        ),
    ),
    "stablelm": Family(config=lambda: hf.StableLmConfig(**GQA, use_qkv_bias=True, qk_layernorm=True)),
    "starcoder2": Family(config=lambda: hf.Starcoder2Config(**GQA, sliding_window=4, residual_dropout=0.0)),
    "olmo2": Family(config=lambda: hf.Olmo2Config(**GQA)),
    "glm": Family(config=lambda: hf.GlmConfig(**GQA, head_dim=8)),
    "glm4": Family(config=lambda: hf.Glm4Config(**GQA, head_dim=8)),
    "cohere": Family(config=lambda: hf.CohereConfig(**GQA, use_qk_norm=True)),
    "cohere2": Family(config=lambda: hf.Cohere2Config(**GQA, sliding_window=4, layer_types=MIXED)),
    "granite": Family(
        config=lambda: hf.GraniteConfig(**GQA, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0)
    ),
    "gptj": Family(kv_shape=(4, 8), config=lambda: hf.GPTJConfig(**GPT, rotary_dim=4)),
    "phi": Family(config=lambda: hf.PhiConfig(**GQA, qk_layernorm=True)),
    "gpt_neo": Family(
        kv_shape=(4, 8),
        config=lambda: hf.GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_layers=BLOCKS,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 2], [["local"], 1]],
            window_size=4,
            initializer_range=0.1,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    "nanochat": Family(config=lambda: hf.NanoChatConfig(**GQA)),
    "ctrl": Family(
        kv_shape=(4, 8),
        config=lambda: hf.CTRLConfig(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=32,
            dff=48,
            n_layer=BLOCKS,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
    ),
    "mixtral": Family(
        # "all-linear" would also train the router and the fused experts, which see tokens picked from all rows.
        lora_targets=["q_proj", "k_proj", "v_proj", "o_proj"],
        config=lambda: hf.MixtralConfig(**GQA, num_local_experts=3, num_experts_per_tok=2, sliding_window=4),
    ),
    "qwen2_moe": Family(
        config=lambda: hf.Qwen2MoeConfig(
            **GQA,
            num_experts=3,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            decoder_sparse_step=2,
        )
    ),
}


def make_model(family: str) -> Any:
    """Seeded; norms and biases away from 1 and 0, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(FAMILIES[family].config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.empty_like(parameter).normal_(std=0.2))
    return model.eval()
