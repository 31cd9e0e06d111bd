"""Figure: the split's training losses over the uncut model's, a panel a task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from hpc.report.drawing import BLUE, GREEN, ORANGE, new_figure, save
from hpc.reproduce.rows import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pair = tuple[Result, Result]  # of the uncut model, of the split
Panel = tuple[str, str]  # model, task
WHOLE, SPLIT = "centralised", "serial"
COLOURS = (BLUE, ORANGE, GREEN)
COLUMNS = 4


def draw_losses(rows: Sequence[Row], title: str, path: Path) -> bool:
    """Of the first seed that both have. False: there is nothing to draw."""
    panels = pairs_of(rows)
    if not panels:
        return False
    columns = min(COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)
    width = max(7.0, 3.1 * columns)
    figure, axes = new_figure(width, 1.3 + 2.3 * lines, [1] * lines, columns=columns)
    adapters = sorted({adapter for pairs in panels.values() for adapter in pairs})
    several = len({model for model, _ in panels}) > 1
    for place, ((model, task), pairs) in enumerate(panels.items()):
        _draw(axes[place], pairs, dict(zip(adapters, COLOURS, strict=False)))
        axes[place].set_title(f"{model}, {task}" if several else task, fontsize=10, loc="left")
        if place % columns == 0:
            axes[place].set_ylabel("training loss\n(nats a label token)", fontsize=9)
        if place + columns >= len(panels):
            axes[place].set_xlabel("optimiser step", fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(
        fill(f"Split over centralised training, first seed. {title}", int(12.5 * width)), x=0.01, ha="left", fontsize=10
    )
    save(figure, path)
    return True


def pairs_of(rows: Sequence[Row]) -> dict[Panel, dict[str, Pair]]:
    """Panel → adapter → both runs."""
    results = {(row.model, row.task, row.adapter, row.method): row.results for row in rows}
    found: dict[Panel, dict[str, Pair]] = {}
    for (model, task, adapter, method), wholes in results.items():
        splits = {split.seed: split for split in results.get((model, task, adapter, SPLIT), ())}
        both = [(whole, splits[whole.seed]) for whole in wholes if whole.seed in splits]
        if method == WHOLE and both:
            found.setdefault((model, task), {})[adapter] = both[0]
    return found


def _draw(axis: Axes, pairs: Mapping[str, Pair], colours: Mapping[str, str]) -> None:
    for adapter, (whole, split) in pairs.items():
        colour = colours.get(adapter, "black")
        label = f"{adapter}, {{}}"
        axis.plot(*_curve(whole), color=colour, linewidth=4, alpha=0.35, label=label.format("centralised"))
        axis.plot(
            *_curve(split), "--", color=colour, linewidth=1.2, label=label.format("FL-GLM, serial (dashed, on top)")
        )
    axis.locator_params(axis="x", integer=True)


def _curve(result: Result) -> tuple[range, Sequence[float]]:
    return range(1, len(result.losses) + 1), result.losses
