"""P-tuning v2 as ChatGLM publishes it: keys and values in front of every block's own.

Shape suffixes: B rows, P prefix tokens, N blocks of the whole model, H heads, K head size, D hidden size (H · K).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from hpc.model.chatglm.configuration import ChatGLMConfig

DROPOUT = 0.1  # on the prefixes while training, as published
PUBLISHED = "transformer.prefix_encoder."
"""What the encoder's keys begin with in published files."""


class PrefixTable(nn.Embedding):
    """An embedding that starts from N(0, 1), as published, whatever the model's other weights start from."""


class PrefixEncoder(nn.Module):
    """Gives `kv_2NHPK`: for every block its keys, then its values.

    Without projection a table of width 2 · N · D; with it a table of width D and a network (`trans`) to that width.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        width, columns = config.hidden_size, 2 * config.num_layers * config.hidden_size
        self.embedding = PrefixTable(config.pre_seq_len or 0, width if config.prefix_projection else columns)
        self.trans: nn.Sequential | None = None
        if config.prefix_projection:
            self.trans = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, columns))

    def forward(self, head_size: int) -> torch.Tensor:
        tokens = self.embedding.num_embeddings
        flat = self.embedding(torch.arange(tokens, device=self.embedding.weight.device))
        if self.trans is not None:
            flat = self.trans(flat)
        return flat.view(tokens, -1, self.heads, head_size).permute(1, 2, 0, 3)


def prefix_of_blocks(
    published: Mapping[str, torch.Tensor], *, first: int, last: int, hidden_size: int
) -> dict[str, torch.Tensor]:
    """The prefixes of blocks `first` to `last` (exclusive), as the state of PEFT's `PrefixEncoder` for these blocks.

    `published` holds the tensors whose keys begin with `PUBLISHED`; others are passed over. Both lay out columns in
    the same way and PEFT calls `trans` `transform`, so a part of a cut model can take over its share of a published
    prefix. With projection the shares have the first layers in common: every part gets them whole.
    """
    share = slice(2 * hidden_size * first, 2 * hidden_size * last)
    own = {key.removeprefix(PUBLISHED): tensor for key, tensor in published.items() if key.startswith(PUBLISHED)}
    if "trans.2.weight" not in own:
        return {"embedding.weight": own["embedding.weight"][:, share]}
    cut = {name: own[name][share] for name in ("trans.2.weight", "trans.2.bias")}
    return {name.replace("trans.", "transform."): tensor for name, tensor in {**own, **cut}.items()}
