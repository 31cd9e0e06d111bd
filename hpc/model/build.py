"""From a configuration to the parts of one role, adapters attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hpc.config import Config
from hpc.model.adapters import Prefix, attach_adapter, sections
from hpc.model.chatglm.prefix import PUBLISHED, prefix_of_blocks
from hpc.model.part import Part
from hpc.model.pretrained import load_hf_config
from hpc.model.quantize import count_weights, quantize_part
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source.cut import Cut, PartKind
from hpc.source.files import FileResolver
from hpc.source.published_prefix import published_prefix
from hpc.source.resolve import cut_of, read_config, resolve


@dataclass(kw_only=True)
class ModelBuilder:
    """Builds parts of one model; `source.keys_read` tells afterwards what was read from its files."""

    config: Config
    resolver: FileResolver
    hf_config: Any
    cut: Cut
    source: WeightSource
    published_prefix: int = 0
    """Tokens of the prefix that the model's own files hold; it is what the adapter starts from."""

    @staticmethod
    def of(config: Config) -> ModelBuilder:
        """Raises `ModelError` or `ConfigError` for a model or a cut that cannot be."""
        resolver = resolve(config.model)
        raw_config = read_config(resolver)
        cut = cut_of(config.model, raw_config)
        return ModelBuilder(
            config=config,
            resolver=resolver,
            hf_config=load_hf_config(resolver),
            cut=cut,
            source=WeightSource(resolver),
            published_prefix=published_prefix(config.adapter, raw_config),
        )

    @property
    def dtype(self) -> torch.dtype:
        """Precision of frozen weights and of what crosses the links."""
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        return dtype

    @property
    def hidden_size(self) -> int:
        return int(self.hf_config.get_text_config().hidden_size)

    def part(self, kind: PartKind, *, adapted: bool = True) -> Part:
        """One part on the CPU; `adapted`: with the adapter that the configuration asks for."""
        part = build_part(self.hf_config, self.cut.part(kind), self.source, dtype=self.dtype)
        quantize_part(part, self.config.trunk.quantization, self.cut)
        if adapted or self.published_prefix:
            attach_adapter(part, self.config.adapter, self.cut, self.config.train.seed)
        if self.published_prefix and isinstance(part.prefix, Prefix):
            self._take_over_prefix(part, part.prefix)
        return part

    def _take_over_prefix(self, part: Part, prefix: Prefix) -> None:
        """Each part its own blocks' share of the published one."""
        published = self.source.read([k for k in self.source.keys if k.startswith(PUBLISHED)], dtype=torch.float32)
        for kind, first, last in sections(part, self.cut):
            share = prefix_of_blocks(published, first=first, last=last, hidden_size=self.hidden_size)
            prefix.encoders[kind].load_state_dict(share)

    def client_parts(self, *, adapted: bool = True) -> tuple[Part, Part]:
        """Head and tail. A tied embedding and LM head are one tensor, trained or not: both are on this client."""
        head, tail = self.part("head", adapted=adapted), self.part("tail", adapted=adapted)
        tie(head, tail)
        return head, tail


def tie(head: Part, tail: Part) -> None:
    """Make the embedding of a head and the LM head of a tail one tensor, if the model ties them."""
    if head.tied:
        shared = head.model.get_input_embeddings().weight
        shared.requires_grad_(shared.requires_grad or tail.model.get_output_embeddings().weight.requires_grad)
        tail.model.get_output_embeddings().weight = shared


def count_parameters(part: torch.nn.Module) -> dict[str, int]:
    """Values held and values that learn."""
    return {
        "owned": count_weights(part.parameters()),
        "trainable": sum(p.numel() for p in part.parameters() if p.requires_grad),
    }
