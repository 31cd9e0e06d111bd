"""What a frame tells of its rows where a model's positions depend on token ids (`hpc.model.part.Part.layout_of`).

Shape suffixes: B rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hpc.link.frame import Header


def layout_tensor(headers: Iterable[Header]) -> torch.Tensor | None:
    """`layout_B2` of the rows of these frames together; None where frames tell none."""
    numbers = [number for header in headers for number in header.layout]
    return torch.tensor(numbers, dtype=torch.int64).view(-1, 2) if numbers else None


def layout_numbers(layout_B2: torch.Tensor | None) -> tuple[int, ...]:
    """For `Header.layout`."""
    return () if layout_B2 is None else tuple(layout_B2.flatten().tolist())
