"""The figures of a preset: training losses split over centralised, and each task's main metric by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from hpc.report.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, save
from hpc.reproduce.methods import TITLES, ZERO_SHOT
from hpc.reproduce.numbers import metric_title
from hpc.reproduce.rows import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[str, str, str]  # model, task, adapter
Pair = tuple[Result, Result]  # of the uncut model, of the split
SPLIT, WHOLE = "serial", "centralised"
ADAPTER_COLOURS = (BLUE, ORANGE, GREEN)
METHOD_COLOURS = {
    ZERO_SHOT: GREY,
    "centralised": BLUE,
    "serial": "#56B4E9",
    "fedbert": "#CC79A7",
    "centralised_union": ORANGE,
    "client_batch": "#E69F00",
    "replica": GREEN,
}


def draw_losses(rows: Sequence[Row], title: str, path: Path) -> bool:
    """A panel a task: the split's training losses dashed over the uncut model's. False: there is nothing to draw."""
    curves = _pairs(rows)
    panels = list(dict.fromkeys((model, task) for model, task, _ in curves))
    if not panels:
        return False
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure, axes = new_figure(max(7, 3.1 * columns), 1.0 + 2.3 * lines, [1] * lines, columns=columns)
    colours = _colours(list(dict.fromkeys(adapter for _, _, adapter in curves)))
    for axis, (model, task) in zip(axes, panels, strict=False):
        for (_, _, adapter), (whole, split) in _of_panel(curves, model, task).items():
            steps = range(1, len(whole.losses) + 1)
            axis.plot(
                steps, whole.losses, color=colours[adapter], linewidth=4, alpha=0.35, label=f"{adapter}, centralised"
            )
            steps = range(1, len(split.losses) + 1)
            axis.plot(
                steps, split.losses, "--", color=colours[adapter], linewidth=1.2, label=f"{adapter}, split (serial)"
            )
        seed = next(iter(_of_panel(curves, model, task).values()))[0].seed
        axis.set_title(f"{_named(model, task, panels)} (seed {seed})", fontsize=10, loc="left")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("optimiser step", fontsize=10)
    figure.supylabel("training loss (nats a label token)", fontsize=10)
    _finish(figure, axes, title)
    save(figure, path)
    return True


def draw_metrics(rows: Sequence[Row], title: str, path: Path) -> bool:
    """A panel an adapter: bars are means over seeds, whiskers standard deviations. False: there is nothing to draw."""
    done = list({(row.model, row.adapter, row.task, row.method): row for row in rows if row.results}.values())
    panels = list(dict.fromkeys((row.model, row.adapter) for row in done if row.adapter != "none"))
    if not panels:
        return False
    bars = max(
        len([row for row in done if row.model == model and row.adapter in ("none", adapter)])
        for model, adapter in panels
    )
    figure, axes = new_figure(max(7, 2 + 0.2 * bars), 1.2 + 2.8 * len(panels), [1] * len(panels))
    for axis, (model, adapter) in zip(axes, panels, strict=True):
        _draw_bars(axis, [row for row in done if row.model == model and row.adapter in ("none", adapter)])
        axis.set_title(f"{model}, {adapter}", fontsize=10, loc="left")
        axis.set_ylabel("main metric (%)")
    _finish(figure, axes, title)
    save(figure, path)
    return True


def _pairs(rows: Sequence[Row]) -> dict[Curve, Pair]:
    """Model, task and adapter → the uncut and the split run of the first seed that has both."""
    results = {(row.model, row.task, row.adapter, row.method): row.results for row in rows}
    found: dict[Curve, Pair] = {}
    for model, task, adapter, method in results:
        others = {result.seed: result for result in results.get((model, task, adapter, SPLIT), ())}
        both = [(one, others[one.seed]) for one in results[model, task, adapter, method] if one.seed in others]
        if method == WHOLE and both:
            found[model, task, adapter] = both[0]
    return found


def _of_panel(curves: Mapping[Curve, Pair], model: str, task: str) -> dict[Curve, Pair]:
    return {key: pair for key, pair in curves.items() if key[:2] == (model, task)}


def _draw_bars(axis: Axes, rows: Sequence[Row]) -> None:
    tasks = list(dict.fromkeys(row.task for row in rows))
    methods = [method for method in METHOD_COLOURS if any(row.method == method for row in rows)]
    begin, names = 0.0, []
    for task in tasks:
        own = sorted((row for row in rows if row.task == task), key=lambda row: methods.index(row.method))
        for place, row in enumerate(own):
            spread = next(iter(row.metrics.values()))
            label = TITLES[row.method]
            axis.bar(
                begin + place,
                spread.mean,
                0.9,
                yerr=spread.sd,
                capsize=2,
                color=METHOD_COLOURS[row.method],
                label=label,
            )
        names.append((begin + (len(own) - 1) / 2, f"{task}\n{metric_title(next(iter(own[0].metrics)))}"))
        begin += len(own) + 1.2
    axis.set_xticks([place for place, _ in names], [name for _, name in names], fontsize=8)
    axis.grid(visible=False, axis="x")
    axis.set_ylim(bottom=0)


def _colours(adapters: Sequence[str]) -> dict[str, str]:
    return {adapter: ADAPTER_COLOURS[place % len(ADAPTER_COLOURS)] for place, adapter in enumerate(adapters)}


def _named(model: str, task: str, panels: Sequence[tuple[str, str]]) -> str:
    """The task; with several models, its model too."""
    return task if len({each for each, _ in panels}) == 1 else f"{model}, {task}"


def _finish(figure: Figure, axes: Sequence[Axes], title: str) -> None:
    entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("\n".join(wrap(title, 110)), x=0.01, ha="left", fontsize=10)
