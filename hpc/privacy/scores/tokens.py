"""Scores of token ids: those at the right place, and rows without a mistake."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpc.privacy.scores.interval import Statistics, share
from hpc.privacy.seen import Rows


def token_accuracy(guesses: Rows, truth: Rows) -> Statistics:
    """Tokens guessed at their own place, of all tokens of all rows."""
    return Statistics(rows_RK=np.array([_hits(*pair) for pair in zip(guesses, truth, strict=True)]), score=share)


def exact_rows(guesses: Rows, truth: Rows) -> Statistics:
    """Rows of which every token is right."""
    pairs = zip(guesses, truth, strict=True)
    return Statistics(rows_RK=np.array([[float(list(a) == list(b)), 1.0] for a, b in pairs]), score=share)


def _hits(guess: Sequence[int], true: Sequence[int]) -> list[float]:
    return [float(sum(a == b for a, b in zip(guess, true, strict=True))), float(len(true))]
