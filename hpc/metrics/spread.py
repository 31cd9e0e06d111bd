"""Mean and standard deviation over seeds, for a table's cell."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from hpc.errors import DataError


class Spread(NamedTuple):
    """Mean of some runs, and how far they lie apart."""

    mean: float
    sd: float | None
    """Sample standard deviation (n - 1); `None` for a single run, about whose spread nothing is known."""


def mean_sd(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation of the runs' values. Raises `DataError` for no values."""
    if not values:
        raise DataError("no values to average; at least one run must have finished")
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None)
