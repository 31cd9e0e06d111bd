"""A table for programs: one line a task, adapter and method, with every metric unrounded and the names of its runs."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from hpc.reproduce import published
from hpc.reproduce.rows import Comparison, Row

FIRST = ("table", "model", "task", "adapter", "method", "seeds", "seeds_planned", "examples", "unparsed", "main_metric")
COMPARED = (
    "reference",
    "difference_mean",
    "difference_lowest",
    "difference_highest",
    "seeds_compared",
    "predictions_equal",
    "loss_difference",
    "loss_difference_relative",
)


def text(rows: Sequence[Row]) -> str:
    """Numbers as Python writes them, so that nothing is lost; empty where there is none."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    spreads = [f"{name}_{part}" for name in names for part in ("mean", "sd")]
    writer.writerow([*FIRST, *spreads, *COMPARED, "published", "runs"])
    for row in rows:
        writer.writerow(_line(row, names))
    return target.getvalue()


def _line(row: Row, names: Sequence[str]) -> list[object]:
    examples = "/".join(dict.fromkeys(str(result.examples) for result in row.results))
    main = next(iter(row.metrics), "")
    first = [row.table, row.model, row.task, row.adapter, row.method, len(row.results), row.planned, examples]
    spreads = [value for name in names for value in row.metrics.get(name, (None, None))]
    runs = " ".join(result.run for result in row.results)
    return [*first, row.unparsed, main, *spreads, *_compared(row.comparison), _published(row), runs]


def _compared(comparison: Comparison | None) -> list[object]:
    if comparison is None:
        return [None] * len(COMPARED)
    main = next(iter(comparison.differences.values()))
    return [
        comparison.reference,
        sum(main) / len(main),
        min(main),
        max(main),
        len(main),
        sum(comparison.equal),
        comparison.loss,
        comparison.relative_loss,
    ]


def _published(row: Row) -> str:
    """Beside the split row that the paper has."""
    if row.method != "serial":
        return ""
    known = [each for each in published.SCORES if (each.table, each.task) == (row.table, row.task)]
    return "; ".join(f"{each.method}: {each.metric} {each.value:g}" for each in known)
