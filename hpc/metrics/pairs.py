"""What every metric does first: pair predictions with references, and turn fractions into percent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TypeVar

from hpc.errors import DataError

Prediction = TypeVar("Prediction")
Reference = TypeVar("Reference")


def paired(predictions: Sequence[Prediction], references: Sequence[Reference]) -> list[tuple[Prediction, Reference]]:
    """(prediction, reference) of each example. Raises `DataError` if one has no partner, or there is none at all."""
    if len(predictions) != len(references):
        raise DataError(
            f"{len(predictions)} predictions for {len(references)} references: every example must have both, in the "
            "same order; an interrupted run has to be finished before it is scored"
        )
    if not references:
        raise DataError("there are no predictions to score; choose a split that has examples")
    return list(zip(predictions, references, strict=True))


def percent(fractions: Iterable[float]) -> float:
    """Mean of fractions, times 100."""
    return 100 * fmean(fractions)


def is_blank(text: str | None) -> bool:
    """No answer at all, or nothing but white space."""
    return text is None or not text.strip()
