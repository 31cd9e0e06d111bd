"""How a table shows numbers: rounded for reading, but never to nothing. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpc.metrics.spread import Spread

NOTHING = "–"
"""A run that is not there, or a number that is not known."""
METRIC_TITLES = {
    "macro_f1": "macro-F1",
    "f1_a": "F1a",
    "f1_m": "F1m",
    "f1": "F1",
    "em": "EM",
    "em1": "EM1",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu4": "BLEU-4",
    "exact_match": "exact match",
}


def metric_title(name: str) -> str:
    return METRIC_TITLES.get(name, name)


def fixed(value: float, digits: int, sign: str = "") -> str:
    """So many digits behind the point, unless nothing were left of it: then one that counts."""
    text = f"{value:{sign}.{digits}f}"
    return f"{value:{sign}.0e}" if value and not float(text) else text


def mean_and_sd(spread: Spread) -> str:
    return fixed(spread.mean, 1) + ("" if spread.sd is None else f" ± {fixed(spread.sd, 1)}")


def points(differences: Sequence[float]) -> str:
    """Percentage points: the mean over seeds, and the range where seeds differ. `0` is exactly 0 in every seed."""
    if not any(differences):
        return "0"
    mean = fixed(sum(differences) / len(differences), 2, "+")
    low, high = min(differences), max(differences)
    return mean if low == high else f"{mean} ({_end(low)} … {_end(high)})"


def loss_difference(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def joined(values: Iterable[object]) -> str:
    """Each value once, in order of first appearance."""
    return ", ".join(dict.fromkeys(map(str, values))) or NOTHING


def _end(value: float) -> str:
    return fixed(value, 2, "+") if value else "0"
