"""What stands in a part where the uncut model has a module of another part. None of these holds a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Absent(nn.Module):
    """Stands for a module of another part; running it is a mistake in the split."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name} belongs to another part and must not run here")


class PassThrough(nn.Module):
    """Stands for a layer in front of the blocks or after them whose result is not read here."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


class NoEmbedding(nn.Module):
    """Stands for a table of positions: a zero, which the stack adds to the hidden states that it was given."""

    def forward(self, indices: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=indices.device)
