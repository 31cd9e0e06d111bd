"""How much memory the parts of a role take, from the model's skeleton on the meta device: no weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hpc.config import Config
from hpc.model.adapters import attach_adapter
from hpc.model.build import tie
from hpc.model.part import Part
from hpc.model.pretrained import load_hf_config
from hpc.model.quantize import quantizable_weights
from hpc.model.split import empty_part
from hpc.source.cut import Cut, PartKind
from hpc.source.resolve import cut_of, read_config, resolve

# In float32: the value itself, its gradient, and AdamW's two moments.
LEARNING_BYTES = 4 * 4
QUANTIZED_BYTES = {"int8": 1.0, "nf4": 0.5}
CONTENTS = (
    "memory: the weights that the role holds (in --model.dtype, or quantised), and 16 bytes for each value that learns "
    "(float32: itself, gradient, two AdamW moments), before ZeRO shares or offloads any of it. Not in it: activations, "
    "messages, caches, and the libraries themselves (about 0.4 GiB a process)."
)


@dataclass(kw_only=True, frozen=True)
class RoleWeights:
    """What one kind of role holds."""

    frozen_bytes: int
    learning: int
    """Values that learn (of a trunk with replicas: those of one client)."""
    block_values: int
    """Of the base model's blocks, which every token passes."""
    hidden_size: int


def role_bytes(config: Config) -> dict[str, int]:
    """Bytes of each kind of role: `trunk` and `client`, or `centralised`. Raises `ModelError` or `ConfigError`."""
    resolver = resolve(config.model)
    cut = cut_of(config.model, read_config(resolver))
    weights = role_weights(config, load_hf_config(resolver), cut)
    return {kind: bytes_of(kind, each, config) for kind, each in weights.items()}


def bytes_of(kind: str, weights: RoleWeights, config: Config) -> int:
    """See `CONTENTS`. In `replica`, a trunk has one copy of what learns for each client of a rank."""
    replicas = kind == "trunk" and config.train.schedule == "replica"
    copies = -(-config.train.clients // config.trunk.ranks) if replicas else 1
    return weights.frozen_bytes + copies * weights.learning * LEARNING_BYTES


def role_weights(config: Config, hf_config: Any, cut: Cut) -> dict[str, RoleWeights]:
    """By kind of role. `hf_config`: the `PretrainedConfig`, from the model's folder or made of known numbers."""
    if config.train.schedule == "centralised":
        return {"centralised": _weights_of(("whole",), config, hf_config, cut)}
    return {
        "trunk": _weights_of(("trunk",), config, hf_config, cut),
        "client": _weights_of(("head", "tail"), config, hf_config, cut),
    }


def _weights_of(kinds: tuple[PartKind, ...], config: Config, hf_config: Any, cut: Cut) -> RoleWeights:
    parts = [empty_part(hf_config, cut.part(kind)) for kind in kinds]
    saved = sum(_saved_by_quantizing(part, config) for part in parts)
    block_values = sum(p.numel() for part in parts for p in part.blocks.parameters())
    for part in parts:
        with torch.device("meta"):
            attach_adapter(part, config.adapter, cut, config.train.seed)
    if len(parts) == 2:
        tie(*parts)
    values = {id(p): p for part in parts for p in part.parameters()}.values()
    width = getattr(torch, config.model.dtype).itemsize
    return RoleWeights(
        frozen_bytes=int(sum(p.numel() for p in values if not p.requires_grad) * width - saved),
        learning=sum(p.numel() for p in values if p.requires_grad),
        block_values=block_values,
        hidden_size=parts[0].hidden_size,
    )


def _saved_by_quantizing(part: Part, config: Config) -> float:
    kind = config.trunk.quantization
    if kind == "none" or part.spec.kind != "trunk":
        return 0.0
    width: int = getattr(torch, config.model.dtype).itemsize
    return quantizable_weights(part) * (width - QUANTIZED_BYTES[kind])
