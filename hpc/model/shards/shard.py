"""What a file of tensors is to the rest of the program, whatever its format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch


class Shard(Protocol):
    """One open file of tensors. Opening reads its table of contents, nothing more."""

    def keys(self) -> Iterable[str]:
        """Names of its tensors in the whole model."""
        ...

    def stored_bytes(self, key: str) -> int:
        """Size of a tensor as the file stores it (bytes)."""
        ...

    def read(self, keys: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The named tensors, in `dtype` where they are floating point. Raises `ModelError` naming the tensor."""
        ...
