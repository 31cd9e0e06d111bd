"""bitsandbytes' layers as a trunk needs them: frozen, and computing the same in training and in evaluation.

LLM.int8() (Dettmers et al., 2022) keeps a weight as int8 with one scale for each output. NF4 (QLoRA, Dettmers et al.,
2023) keeps it as 4-bit codes with a scale for 64 values, the scales themselves in 8 bits. On a CPU both compute with
the dequantised weight in the activations' precision; on a GPU int8 rounds the activations too.

Shape suffixes: B rows, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that a layer in training never uses

from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: E402

OUTLIER = 6.0
"""On a GPU, columns of activations beyond this are not rounded (LLM.int8()'s published threshold)."""


class Int8Linear(Linear8bitLt):
    """An int8 layer without its own mode: in evaluation the library would round the activations on a CPU as well."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            has_fp16_weights=False,
            threshold=OUTLIER,
            device="meta",
        )
        self.weight = Int8Params(linear.weight.data, requires_grad=False).cpu()
        self.bias = linear.bias

    def train(self, mode: bool = True) -> Int8Linear:
        return super().train(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `_BTI`; returns `_BTO`."""
        out: torch.Tensor = super().forward(x)
        node = out.grad_fn
        if node is not None and x.numel():
            # Kept for a gradient of the weight, which is frozen, and outside of what activation checkpointing can drop.
            node.A, node.tensors = None, (None, None, None)  # type: ignore[attr-defined]
        return out


class Nf4Linear(Linear4bit):
    """A 4-bit layer without its own mode: in evaluation the library would repack the weight for a CPU's bfloat16
    kernel, which has less precision and no backward pass, and would not undo it for the next step."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        self.weight = Params4bit(linear.weight.data, quant_type="nf4", module=self).cpu()
        self.bias = linear.bias

    def train(self, mode: bool = True) -> Nf4Linear:
        return super().train(True)
