"""`clients.png`: how each client learns, beside all of them; readable for 2 clients as for 64."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.report.cells import MANY_CLIENTS
from hpc.report.drawing import BLUE, GREEN, GREY, ORANGE, Summary, known, new_figure, save, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = tuple[list[float], list[float]]  # steps and values

CLIENT_COLOURS = (BLUE, "#E69F00", GREEN, "#CC79A7", "#56B4E9", ORANGE, "#6A3D9A", "#8C6D31")
WINDOWS_PER_CURVE = (
    10  # the means span a tenth of the run; wider than in loss.png, as one client's batches scatter more
)
BAND = (10, 90)  # percentiles
# Key of the evaluation's figures → factor and label
PANELS = {"history": (100, "held-out\naccuracy (%)"), "loss_history": (1, "held-out loss\n(nats per token)")}


def shared_clients(summary: Summary) -> list[str]:
    """The clients whose losses are here and at least once finite."""
    return [client for client, points in summary["losses_by_client"].items() if known(points)[0]]


def plot_clients(summary: Summary, path: Path) -> Path:
    """Training loss of each client, and, where evaluated more than once, held-out accuracy and loss."""
    clients = shared_clients(summary)
    panels = [panel for panel in PANELS if _evaluated(summary, clients, panel)]
    figure, axes = new_figure(8, 4.3 + 2 * len(panels), heights=(3, *(1.6 for _ in panels)))
    _draw_training(axes[0], clients, summary)
    for axis, panel in zip(axes[1:], panels, strict=True):
        _draw_evaluations(axis, clients, summary, panel)
        axis.sharex(axes[0])
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    axes[-1].set_xlabel("optimiser step")
    axes[0].set_title(title(summary), loc="left", fontsize=11)
    # Panels share their colours, so one legend serves all; the first entry of a name stands for it.
    entries = {name: line for axis in axes for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=5, frameon=False)
    return save(figure, path)


def _evaluated(summary: Summary, clients: Sequence[str], panel: str) -> bool:
    return any(len(steps) > 1 for steps, _ in _evaluations(summary, clients, panel).values())


def _evaluations(summary: Summary, clients: Sequence[str], panel: str) -> dict[str, Curve]:
    found = summary["eval"]["per_client"]
    curves = {client: known(found[client][panel]) for client in clients if client in found}
    return {client: (steps, values) for client, (steps, values) in curves.items() if steps}


def _draw_training(axis: Axes, clients: Sequence[str], summary: Summary) -> None:
    total = len(summary["losses"])
    window = max(1, total // WINDOWS_PER_CURVE)
    found = {client: known(summary["losses_by_client"][client]) for client in clients}
    curves = {client: (steps, recent_means(steps, losses, window)) for client, (steps, losses) in found.items()}
    gaps = any(len(steps) < total for steps, _ in curves.values())
    _draw_clients(axis, curves, marker="." if gaps else "")
    if len(curves) > MANY_CLIENTS:
        steps, middle = _percentile(curves, 50)
        axis.plot(steps, middle, color=BLUE, linewidth=2.2, label="median client")
    axis.set_ylabel("training loss\n(nats per label token)")
    if window > 1:
        text = f"each client's mean over the last {window} steps"
        axis.text(0.99, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=8, color="#555555")


def recent_means(steps: Sequence[float], losses: Sequence[float], window: int) -> list[float]:
    """At each of a client's steps, its mean loss in the last `window` steps of the run.

    Not of its own last ones: after a pause those are old, and their mean would show it learning late.
    """
    begins = [bisect_right(steps, step - window) for step in steps]
    return [math.fsum(losses[begin : end + 1]) / (end + 1 - begin) for end, begin in enumerate(begins)]


def _draw_evaluations(axis: Axes, clients: Sequence[str], summary: Summary, panel: str) -> None:
    scale, label = PANELS[panel]
    curves = {
        client: (steps, [scale * value for value in values])
        for client, (steps, values) in _evaluations(summary, clients, panel).items()
    }
    _draw_clients(axis, curves, marker="o")
    steps, values = known(summary["eval"][panel])
    if len(values) > 1:
        values = [scale * value for value in values]
        # Dashed, as clients often lie so close together that a full line would hide them.
        axis.plot(steps, values, "o--", color="black", linewidth=2, markersize=5, label="all clients")
    axis.set_ylabel(label)


def _draw_clients(axis: Axes, curves: Mapping[str, Curve], marker: str) -> None:
    """A colour for each of few clients; of many, thin grey lines and the band in which most of them lie.

    `marker` shows where a client took part, if lines lead over steps in which it did not.
    """
    if len(curves) <= MANY_CLIENTS:
        for (client, (steps, values)), colour in zip(curves.items(), CLIENT_COLOURS, strict=False):
            axis.plot(steps, values, color=colour, marker=marker, markersize=4, linewidth=1.4, label=client)
        return
    for number, (steps, values) in enumerate(curves.values()):
        axis.plot(steps, values, color=GREY, linewidth=0.6, alpha=0.7, zorder=1.5, label="" if number else "one client")
    steps, low = _percentile(curves, BAND[0])
    _, high = _percentile(curves, BAND[1])
    axis.fill_between(steps, low, high, color=BLUE, alpha=0.25, linewidth=0, zorder=1.8, label="8 of 10 clients")


def _percentile(curves: Mapping[str, Curve], percent: float) -> Curve:
    """Percentile over the curves as they are drawn: straight over a gap; after its last point a client stays there."""
    import numpy as np

    steps = sorted({step for own, _ in curves.values() for step in own})
    values_CS = np.array([np.interp(steps, own, values, left=np.nan) for own, values in curves.values()])
    return steps, np.nanpercentile(values_CS, percent, axis=0).tolist()
