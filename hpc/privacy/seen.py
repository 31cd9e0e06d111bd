"""What the server saw of one batch of a client, and what was true of it: the material of every attack.

Shape suffixes: S valid tokens of all rows together, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Rows = Sequence[Sequence[int]]
"""Token ids of each row; what an attack guesses has this form too."""


@dataclass(kw_only=True, frozen=True)
class Seen:
    """One batch as the trunk received it. Rows are packed: `smashed_SD` has `sum(lengths)` rows."""

    client_id: int
    step: int
    lengths: tuple[int, ...]
    smashed_SD: torch.Tensor
    """float32, on the CPU."""
    grad_trunk_out_SD: torch.Tensor | None = None
    """What the client sent back, float32; None where nothing was (an evaluation)."""
    trunk_out_SD: torch.Tensor | None = None
    """What the trunk answered with, float32: its own work, and what a gradient is matched at."""
    label_tokens: int = 0
    """The weight that the client names with its batch."""

    def rows_TD(self) -> list[torch.Tensor]:
        """The smashed activations of each row."""
        return list(self.smashed_SD.split(list(self.lengths)))


@dataclass(kw_only=True, frozen=True)
class Truth:
    """What only the client knows of a batch: of the victim for scoring, of a colluding client for learning."""

    ids: tuple[tuple[int, ...], ...]
    """Token ids of each row, as many as its length."""
    label_rows: tuple[int, ...]
    label_positions: tuple[int, ...]
    """The hidden state at (row, position) predicts the label."""
    label_ids: tuple[int, ...]


@dataclass(kw_only=True, frozen=True)
class Sample:
    """A batch with its truth."""

    seen: Seen
    truth: Truth
