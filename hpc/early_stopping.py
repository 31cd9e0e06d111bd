"""When a held-out loss no longer falls. Each client counts for itself; the run ends when more than half would stop."""

from __future__ import annotations

import math
from collections.abc import Mapping


class Patience:
    """Counts evaluations in a row that were no better than the best before them."""

    def __init__(self, limit: int) -> None:
        """`limit`: so many are enough; 0: never."""
        self._limit, self._best, self._since = limit, math.inf, 0

    def take(self, loss: float) -> None:
        """The held-out loss of one evaluation (any unit); not-a-number is no improvement."""
        if loss < self._best:
            self._best, self._since = loss, 0
        else:
            self._since += 1

    @property
    def exhausted(self) -> bool:
        return 0 < self._limit <= self._since

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"best_loss": self._best, "since_best": float(self._since)}

    def load(self, state: Mapping[str, float]) -> None:
        self._best = state.get("best_loss", math.inf)
        self._since = int(state.get("since_best", 0))


def majority(votes: int, voters: int) -> bool:
    return 2 * votes > voters
