"""What one part remembers of rows that are being continued: keys and values, and which columns are real tokens.

Rows are left-padded here, so that all of them are continued in the same column. Shape suffixes: B rows, T new columns,
C all columns so far, P prefix tokens.
"""

from __future__ import annotations

from typing import Any

import torch


class Memory:
    """One part's key-value cache for `rows` rows. `Part.extend` fills it."""

    def __init__(self, cache: Any, *, rows: int, prefix_tokens: int, position_offset: int) -> None:
        """`cache`: a transformers `Cache` that holds `prefix_tokens` columns; tokens count from `position_offset`."""
        self.cache, self._offset = cache, position_offset
        self.layout_B2: torch.Tensor | None = None  # see `Part.layout_of`
        self._prefix_BP = torch.ones(rows, prefix_tokens, dtype=torch.int64)
        self._mask_BC = torch.ones(rows, 0, dtype=torch.int64)

    @property
    def rows(self) -> int:
        return len(self._mask_BC)

    @property
    def columns(self) -> int:
        """Columns so far, padding included, prefixes not."""
        return self._mask_BC.shape[1]

    def extend(self, mask_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in new columns (1: a token, 0: left padding). Gives the whole attention mask and `positions_BT`."""
        self._mask_BC = torch.cat([self._mask_BC, mask_BT.to(self._mask_BC)], 1)
        positions_BC = (self._mask_BC.cumsum(1) - 1).clamp(min=0) + self._offset
        return torch.cat([self._prefix_BP, self._mask_BC], 1), positions_BC[:, -mask_BT.shape[1] :]

    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row b goes on from what row `rows_B[b]` was: beam search. There may be more or fewer rows than before."""
        self.cache.reorder_cache(rows_B)
        rows_B = rows_B.to(self._mask_BC.device)
        self._mask_BC, self._prefix_BP = self._mask_BC[rows_B], self._prefix_BP[rows_B]
        if self.layout_B2 is not None:
            self.layout_B2 = self.layout_B2[rows_B.to(self.layout_B2.device)]
