"""Which tensors a run's adapter consists of, read off the model's configuration: no weights are loaded.

An adapter that comes over a link or from a file is held to this before anybody uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hpc.config import AdapterConfig, ModelConfig
from hpc.export.portable import PARTS
from hpc.model.adapters import default_targets, kv_shape
from hpc.model.anatomy import Anatomy, is_linear
from hpc.model.pretrained import load_hf_config
from hpc.model.split import skeleton, studied
from hpc.source.cut import Cut, PartKind
from hpc.source.resolve import cut_of, read_config, resolve

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(kw_only=True, frozen=True)
class Layout:
    """The model, where it is cut, and what learns in it."""

    hf_config: Any
    cut: Cut
    adapter: AdapterConfig

    @staticmethod
    def of(model: ModelConfig, adapter: AdapterConfig) -> Layout:
        """Raises `ModelError` for a model that is not there, `ConfigError` for a cut that cannot be."""
        resolver = resolve(model)
        return Layout(hf_config=load_hf_config(resolver), cut=cut_of(model, read_config(resolver)), adapter=adapter)

    @cached_property
    def skeleton(self) -> Any:
        """The whole model on the meta device."""
        return skeleton(self.hf_config)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where its blocks are, and what is in them."""
        return studied(self.skeleton, self.hf_config)

    @property
    def kv_shape(self) -> tuple[int, int]:
        """Heads of a block's keys and values, and values of a head. Raises `ModelError` where blocks differ."""
        return kv_shape(self.anatomy, type(self.skeleton).__name__)

    def blocks(self, kinds: Iterable[PartKind]) -> set[int]:
        """The blocks that learn in these parts."""
        specs = [self.cut.part(kind) for kind in kinds if kind in self.adapter.parts]
        return {block for spec in specs for block in range(spec.first, spec.last)}

    @property
    def covers_all_blocks(self) -> bool:
        """Whether every block of the model learns."""
        return len(self.blocks(PARTS)) == self.cut.blocks

    def shapes(self, kinds: Sequence[PartKind]) -> Shapes:
        """Portable name → shape of all that the blocks of these parts train (`hpc.export.portable`)."""
        if self.adapter.method == "p_tuning_v2":
            return self._prefix_shapes(kinds)
        blocks = self.blocks(kinds)
        if self.adapter.method == "full":
            return {n: tuple(p.shape) for n, p in self.skeleton.named_parameters() if block_of(n) in blocks}
        found: dict[str, tuple[int, ...]] = {}
        for name, (inputs, outputs) in self.lora_layers(blocks).items():
            found[f"base_model.model.{name}.lora_A.weight"] = self.adapter.lora_r, inputs
            found[f"base_model.model.{name}.lora_B.weight"] = outputs, self.adapter.lora_r
        return found

    def _prefix_shapes(self, kinds: Sequence[PartKind]) -> Shapes:
        heads, head_dim = self.kv_shape
        counts = {kind: len(self.blocks([kind])) for kind in kinds}
        rows, columns = self.adapter.num_virtual_tokens, 2 * heads * head_dim
        return {f"prefix.{kind}": (rows, count * columns) for kind, count in counts.items() if count}

    def outside_blocks(self, kinds: Sequence[PartKind]) -> Shapes:
        """What these parts may train besides their blocks: with `full`, embedding, final norm and LM head."""
        if self.adapter.method != "full" or not {"head", "tail"} & {*kinds} & {*self.adapter.parts}:
            return {}
        return {n: tuple(p.shape) for n, p in self.skeleton.named_parameters() if block_of(n) is None}

    def lora_layers(self, blocks: set[int]) -> dict[str, tuple[int, int]]:
        """Names of the layers in these blocks that have LoRA → their inputs and outputs."""
        targets = self.adapter.target_modules or default_targets(self.anatomy)
        layers = {n: m for n, m in self.skeleton.named_modules() if block_of(n) in blocks and is_linear(m)}
        return {n: _sizes(m) for n, m in layers.items() if n.rpartition(".")[2] in targets}


def _sizes(layer: Any) -> tuple[int, int]:
    if isinstance(layer, torch.nn.Linear):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf  # transformers' Conv1D


def block_of(name: str) -> int | None:
    """The block that a module or tensor of the whole model belongs to; None outside of the blocks.

    It is the first number in the name, as PEFT has it too: later ones count experts.
    """
    match = re.search(r"\.(\d+)(?:\.|$)", name)
    return int(match[1]) if match else None


def misfit(found: Shapes, layout: Layout, kinds: Sequence[PartKind]) -> str | None:
    """How tensors of these shapes are not what the blocks of these parts train; None if they are."""
    due = layout.shapes(kinds)
    allowed = {**layout.outside_blocks(kinds), **due}
    lacking = [name for name in due if name not in found]
    if lacking:
        return f"{len(lacking)} of {len(due)} tensors are missing, first {lacking[0]}"
    strange = [name for name in found if name not in allowed]
    if strange:
        return f"{len(strange)} tensors do not belong here, first {strange[0]}"
    wrong = [name for name in found if tuple(found[name]) != allowed[name]]
    if wrong:
        return f"{wrong[0]} has shape {tuple(found[wrong[0]])}; due: {allowed[wrong[0]]}"
    return None
