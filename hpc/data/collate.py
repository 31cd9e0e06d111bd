"""From token rows to right-padded batches with their label positions.

Shape suffixes: B rows, T longest row, L label positions (over all rows, row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpc.data.rows import Row


@dataclass(kw_only=True, frozen=True)
class Batch:
    """Rows side by side, and where the loss is.

    The hidden state at (row, position) predicts the label id, the token at position + 1. No other position has a
    loss, so these are all that the client tail needs. Padding is to the right of the valid tokens and never attended.
    """

    ids_BT: torch.Tensor
    """int64."""
    lengths: tuple[int, ...]
    """Valid tokens of each row."""
    label_rows_L: torch.Tensor
    """int64."""
    label_positions_L: torch.Tensor
    """int64."""
    label_ids_L: torch.Tensor
    """int64."""

    @property
    def label_tokens(self) -> int:
        """The weight of this batch in a mean over label tokens."""
        return len(self.label_ids_L)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> torch.Tensor:
    """`ids_BT`, right-padded. Any valid id will do for padding."""
    longest = max(len(ids) for ids in rows)
    return torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in rows], dtype=torch.int64)


def collate(rows: Sequence[Row], pad_id: int = 0) -> Batch:
    """A batch whose labels are the answers' tokens."""
    labels = [
        (row, position, ids.ids[position + 1])
        for row, ids in enumerate(rows)
        for position in range(ids.prompt_len - 1, len(ids.ids) - 1)
    ]
    rows_L, positions_L, ids_L = torch.tensor(labels, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Batch(
        ids_BT=pad_rows([row.ids for row in rows], pad_id),
        lengths=tuple(len(row.ids) for row in rows),
        label_rows_L=rows_L,
        label_positions_L=positions_L,
        label_ids_L=ids_L,
    )


def in_pieces(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The batch's rows in order as several batches of `sizes` rows, each as wide as its own longest row."""
    if len(sizes) == 1:
        return [batch]
    pieces, first = [], 0
    for size in sizes:
        lengths = batch.lengths[first : first + size]
        inside = (batch.label_rows_L >= first) & (batch.label_rows_L < first + size)
        pieces.append(
            Batch(
                ids_BT=batch.ids_BT[first : first + size, : max(lengths)],
                lengths=lengths,
                label_rows_L=batch.label_rows_L[inside] - first,
                label_positions_L=batch.label_positions_L[inside],
                label_ids_L=batch.label_ids_L[inside],
            )
        )
        first += size
    return pieces


def union(batches: Sequence[Batch]) -> Batch:
    """Several clients' batches as one, rows in the given order, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    firsts = [sum(len(batch.lengths) for batch in batches[:index]) for index in range(len(batches))]
    rows = [
        row_T[:length].tolist() for batch in batches for row_T, length in zip(batch.ids_BT, batch.lengths, strict=True)
    ]
    return Batch(
        ids_BT=pad_rows(rows),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        label_rows_L=torch.cat([b.label_rows_L + first for b, first in zip(batches, firsts, strict=True)]),
        label_positions_L=torch.cat([batch.label_positions_L for batch in batches]),
        label_ids_L=torch.cat([batch.label_ids_L for batch in batches]),
    )
