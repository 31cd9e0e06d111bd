"""What everybody has of the model: its published weights, without any adapter.

Shape suffixes: V vocabulary, D hidden size, B rows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from hpc.config import Config
from hpc.errors import ModelError
from hpc.model.build import ModelBuilder
from hpc.model.part import Part
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.defences.noise import clip_rows

_IDS_AT_ONCE = 4096


@dataclass(kw_only=True)
class PublicModel:
    """The model of a run as its server knows it: from the hub, and from the configuration that all roles agree on."""

    config: Config
    embedding_VD: torch.Tensor
    """float32, frozen base as published, on the CPU."""
    head: Part
    """Embedding and `head_blocks` public blocks, in the run's dtype, no adapter, eval mode."""

    @staticmethod
    def of(config: Config) -> PublicModel:
        """Raises `ModelError` or `ConfigError` for a model or a cut that cannot be."""
        head = _head(config)
        embedding_VD = head.model.get_input_embeddings().weight.detach().float()
        return PublicModel(config=config, embedding_VD=embedding_VD, head=head)

    @cached_property
    def entry(self) -> Part:
        """The head of a client without blocks: token ids → what the first block gets."""
        cut_0 = replace(self.config, model=replace(self.config.model, head_blocks=0))
        return self.head if self.config.model.head_blocks == 0 else _head(cut_0)

    @cached_property
    def whole(self) -> Part:
        """The uncut model: an attacker's language model."""
        return ModelBuilder.of(self.config).part("whole", adapted=False).eval()

    @cached_property
    def tail(self) -> Part:
        """Last blocks, norm and LM head."""
        _, tail = ModelBuilder.of(self.config).client_parts(adapted=False)
        if tail.prefix is None and self.head.position_offset:
            tail.position_offset = self.head.position_offset
        return tail.eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own."""
        return load_tokenizer(ModelBuilder.of(self.config).resolver)

    def as_sent(self, rows_TD: torch.Tensor) -> torch.Tensor:
        """What a client of the run makes of such rows before they leave, noise aside: clipped, if the run clips."""
        norm = self.config.privacy.clip_norm
        return clip_rows(rows_TD, norm) if norm else rows_TD

    @property
    def vocabulary(self) -> int:
        """V: token ids are below it."""
        return len(self.embedding_VD)

    @torch.no_grad()
    def entries_VD(self) -> torch.Tensor:
        """What the first block gets of each token at the first position, float32."""
        ids_V = torch.arange(self.vocabulary)
        return torch.cat([self._entries(ids[:, None])[:, 0] for ids in ids_V.split(_IDS_AT_ONCE)])

    def _entries(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """float32 `_BTD`. Where positions follow from token ids (ChatGLM), they come in with the first block only."""
        layout_B2 = torch.zeros(len(ids_BT), 2, dtype=torch.int64) if self.entry.needs_layout else None
        return self.entry(ids_BT, layout_B2=layout_B2).float()

    @torch.no_grad()
    def offsets_TD(self, tokens: int) -> torch.Tensor:
        """What is added to `entries_VD` at each position, float32: 0 unless positions are learned (GPT-2, OPT).

        Raises `ModelError` for a model whose first positions do not just add to its embeddings.
        """
        two_ids_BT = torch.tensor([[0], [self.vocabulary - 1]]).expand(2, tokens)
        entries_BTD = self._entries(two_ids_BT)
        offsets_BTD = entries_BTD - entries_BTD[:, :1]
        if not torch.allclose(offsets_BTD[0], offsets_BTD[1], atol=1e-2 * float(entries_BTD.abs().max())):
            raise ModelError(f"{self.config.model.name_or_path}: its positions do not just add to its embeddings")
        return offsets_BTD[0]


def _head(config: Config) -> Part:
    """Public blocks and no adapter, at the positions that the adapter's prefixes leave to tokens."""
    part = ModelBuilder.of(config).part("head", adapted=False).eval()
    if config.adapter.method == "p_tuning_v2" and not part.needs_layout and part.prefix is None:
        part.position_offset = config.adapter.num_virtual_tokens
    return part
