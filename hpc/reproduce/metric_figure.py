"""Figure: each task's main metric by method, a panel an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from hpc.report.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, save
from hpc.reproduce.methods import TITLES, ZERO_SHOT
from hpc.reproduce.numbers import metric_title
from hpc.reproduce.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    ZERO_SHOT: GREY,
    "centralised": BLUE,
    "serial": "#56B4E9",
    "fedbert": "#CC79A7",
    "centralised_union": ORANGE,
    "client_batch": "#E69F00",
    "replica": GREEN,
}
INCHES_A_BAR = 0.21
GAP = 1.0  # between tasks, in bars


def draw_metrics(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Bars are means over seeds, whiskers standard deviations. False: there is nothing to draw."""
    panels = panels_of(rows)
    if not panels:
        return False
    width = max(8.0, 1 + INCHES_A_BAR * max(_bars(own) for own in panels.values()))
    figure, axes = new_figure(width, 1.5 + 2.6 * len(panels), [1] * len(panels))
    for axis, ((model, adapter), own) in zip(axes, panels.items(), strict=True):
        _draw(axis, own)
        axis.set_title(f"{model}, {adapter}", fontsize=10, loc="left")
        axis.set_ylabel("main metric (%)", fontsize=9)
    entries = {name: bar for axis in axes for bar, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    known = [name for name in map(TITLES.__getitem__, COLOURS) if name in entries]
    bars = [entries[name] for name in known]
    figure.legend(bars, known, loc="outside lower center", ncols=int(width / 2.6), frameon=False, fontsize=9)
    text = f"Main metric by method: mean over seeds, whiskers standard deviation. {title}"
    figure.suptitle(fill(text, int(12.5 * width)), x=0.01, ha="left", fontsize=10)
    save(figure, path)
    return True


def panels_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Model and adapter → rows that have a run; the untrained model stands in each panel that has its task."""
    done = {(row.model, row.adapter, row.task, row.method): row for row in rows if row.results}  # once over all tables
    found: dict[tuple[str, str], list[Row]] = {}
    for model, adapter in dict.fromkeys((model, adapter) for model, adapter, _, _ in done if adapter != "none"):
        own = [row for row in done.values() if (row.model, row.adapter) == (model, adapter)]
        tasks = {row.task for row in own}
        zero = [row for row in done.values() if (row.model, row.adapter) == (model, "none") and row.task in tasks]
        found[model, adapter] = [*zero, *own]
    return found


def _bars(rows: Sequence[Row]) -> float:
    return len(rows) + GAP * len({row.task for row in rows})


def _draw(axis: Axes, rows: Sequence[Row]) -> None:
    begin = 0.0
    ticks = {}
    for task in dict.fromkeys(row.task for row in rows):
        own = sorted((row for row in rows if row.task == task), key=lambda row: list(COLOURS).index(row.method))
        for place, row in enumerate(own):
            _draw_bar(axis, begin + place, row)
        ticks[begin + (len(own) - 1) / 2] = f"{task}\n{metric_title(next(iter(own[0].metrics)))}"
        begin += len(own) + GAP
    axis.set_xticks(list(ticks), list(ticks.values()), fontsize=8)
    axis.set_xlim(-1, begin - GAP)
    axis.set_ylim(bottom=0)
    axis.margins(y=0.12)
    axis.grid(visible=False, axis="x")


def _draw_bar(axis: Axes, place: float, row: Row) -> None:
    mean, sd = next(iter(row.metrics.values()))
    axis.bar(place, mean, 0.9, yerr=sd, capsize=2, color=COLOURS[row.method], label=TITLES[row.method])
    axis.annotate(
        f"{mean:.1f}", (place, mean + (sd or 0)), (0, 2), textcoords="offset points", ha="center", fontsize=5.5
    )
