"""A score of several rows, and how sure it is: percentile bootstrap over the rows.

Shape suffixes: R rows, K statistics of a row, N resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
CONFIDENCE = 0.95
FloatArray = npt.NDArray[np.float64]


@dataclass(kw_only=True, frozen=True)
class Interval:
    """In percent."""

    value: float
    low: float
    high: float


@dataclass(kw_only=True, frozen=True)
class Score:
    """One score of an attack."""

    attack: Interval
    floors: Mapping[str, Interval]
    """What those get who have seen nothing, by name (`hpc.privacy.scores.floors`)."""


@dataclass(kw_only=True, frozen=True)
class Statistics:
    """A score that depends on the rows through the sum of their statistics alone."""

    rows_RK: FloatArray
    score: Callable[[FloatArray], float]
    """Sum over the rows, `_K` → percent."""

    def value(self) -> float:
        """Of all rows together."""
        return self.score(self.rows_RK.sum(0))

    def interval(self, seed: int) -> Interval:
        """The value, and 95 % of what it is over rows drawn with replacement; the same for a seed.

        Rows are what is drawn, so tokens of one row count as one observation. Of a single row there is no spread to
        learn from: both ends are then the value.
        """
        generator = np.random.default_rng(seed)
        rows = len(self.rows_RK)
        times_NR = generator.multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES)
        values_N = [self.score(sums_K) for sums_K in times_NR @ self.rows_RK]
        low, high = np.quantile(values_N, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(value=self.value(), low=float(low), high=float(high))


def share(sums_K: FloatArray) -> float:
    """Of statistics (hits, tries): hits in percent of tries."""
    return 100 * float(sums_K[0] / sums_K[1]) if sums_K[1] else 0.0


def f1(sums_K: FloatArray) -> float:
    """Of statistics (hits, guessed, true): F1 in percent."""
    both = sums_K[1] + sums_K[2]
    return 100 * float(2 * sums_K[0] / both) if both else 0.0
