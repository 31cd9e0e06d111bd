"""The trunk's frozen linear layers in 8 or 4 bits; norms, embeddings and the LM head stay as they are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Literal, cast

import torch
from torch import nn

from hpc.errors import ModelError
from hpc.model.part import Part
from hpc.quantizer import require_quantizer
from hpc.source.cut import Cut

# Layers that compute as nn.Linear does; other subclasses may not, and keep their weights.
LINEAR = ("Linear", "FalconLinear")
MOST_LEFT = 0.1
"""Most of the blocks' weights (fraction) that may stay unquantised before the model is refused."""


def quantize_part(part: Part, kind: Literal["none", "int8", "nf4"], cut: Cut) -> None:
    """Replace the linear layers of the blocks that a trunk owns at this cut, one at a time, each freed as it goes.

    For a freshly loaded part, before an adapter is attached. In a whole model these are the same blocks, so that the
    baseline computes what the split run does. Raises `ModelError` if the family keeps its weights in other layers, and
    `ConfigError` if the library is missing.
    """
    owned = [block for n, block in enumerate(part.blocks, part.spec.first) if cut.kind_of_block(n) == "trunk"]
    if kind == "none" or not owned:
        return
    require_quantizer(kind)
    from hpc.model.quantized_linear import Int8Linear, Nf4Linear

    make = {"int8": Int8Linear, "nf4": Nf4Linear}[kind]
    for block in owned:
        _require_linear(block, kind)
        for name in [name for name, module in block.named_modules() if _is_linear(module)]:
            block.set_submodule(name, make(cast(nn.Linear, block.get_submodule(name))))
    for parameter in (p for block in owned for p in block.parameters()):
        if parameter.is_floating_point():  # what is left (norms) would keep the whole weight file mapped
            parameter.data = parameter.data.clone()
    # PEFT asks the model, not the layer, which LoRA layers it needs.
    part.model.is_loaded_in_8bit, part.model.is_loaded_in_4bit = kind == "int8", kind == "nf4"


def quantizable_weights(part: Part) -> int:
    """Weights of the linear layers of the part's blocks."""
    linear = [cast(nn.Linear, m) for block in part.blocks for m in block.modules() if _is_linear(m)]
    return sum(module.weight.numel() for module in linear)


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in LINEAR and isinstance(module, nn.Linear)


def _require_linear(block: nn.Module, kind: str) -> None:
    """Weights in other kinds of layers would quietly stay as large as they were."""
    sizes: Counter[str] = Counter()
    for module in block.modules():
        held = sum(p.numel() for p in module.parameters(recurse=False))
        sizes["Linear" if _is_linear(module) else type(module).__name__] += held
    total = sum(sizes.values())
    left = total - sizes.pop("Linear", 0)
    if left > MOST_LEFT * total:
        layer, _ = sizes.most_common(1)[0]
        raise ModelError(
            f"--trunk.quantization {kind} replaces linear layers, but {left / total:.0%} of this model's weights are "
            f"in others, most in {layer}; use --trunk.quantization none"
        )


def count_weights(parameters: Iterable[torch.Tensor]) -> int:
    """Number of weights that `parameters` stand for: a 4-bit one holds two in each byte."""
    return sum(_weights(parameter) for parameter in parameters)


def _weights(parameter: torch.Tensor) -> int:
    packed = getattr(parameter, "quant_state", None)
    return parameter.numel() if packed is None else math.prod(packed.shape)
