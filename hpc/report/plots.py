"""Plots of a run, from its summary: `loss.png`, `clients.png`, `time.png`. Matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.report.cells import MANY_CLIENTS
from hpc.report.client_plot import plot_clients, shared_clients
from hpc.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    Summary,
    finite,
    known,
    moving_average,
    new_figure,
    save,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COMPONENT_COLOURS = {
    "head": "#56B4E9",
    "trunk": BLUE,
    "tail": "#004466",
    "seal": "#E69F00",
    "open": ORANGE,
    "wire": GREEN,
    "wait": "#E4E4E4",
    "other": GREY,
    "whole step": BLUE,
}
WINDOWS_PER_CURVE = 20  # the moving average spans a twentieth of the run


def plot_all(summary: Summary, folder: str | Path) -> list[Path]:
    """Draw what the summary has figures for; returns the files written."""
    drawn = []
    if any(finite(loss) for loss in summary["losses"]):
        drawn.append(plot_loss(summary, Path(folder) / "loss.png"))
    if len(shared_clients(summary)) > 1:
        drawn.append(plot_clients(summary, Path(folder) / "clients.png"))
    if any(seconds.get("total") for seconds in summary["seconds_per_step_by_role"].values()):
        drawn.append(plot_time(summary, Path(folder) / "time.png"))
    return drawn


def plot_loss(summary: Summary, path: Path) -> Path:
    """Loss of each step with its moving average, the uncut model's loss, and accuracy in a panel of its own."""
    history = summary["eval"]["history"]
    figure, axes = new_figure(8, 5.5 if history else 4, heights=(3, 1.4) if history else (1,))
    _draw_losses(axes[0], summary)
    if history:
        _draw_accuracy(axes[1], history)
        axes[0].tick_params(labelbottom=False)
        axes[1].sharex(axes[0])
    axes[-1].set_xlabel("optimiser step")
    axes[0].set_title(title(summary), loc="left", fontsize=11)
    return save(figure, path)


def _draw_losses(axis: Axes, summary: Summary) -> None:
    steps, losses = known(enumerate(summary["losses"], start=summary["first_step"]))
    window = max(1, len(losses) // WINDOWS_PER_CURVE)
    axis.plot(steps, losses, color=BLUE, alpha=0.35 if window > 1 else 1, linewidth=1, label="each step")
    if window > 1:
        axis.plot(steps, moving_average(losses, window), color=BLUE, linewidth=2, label=f"mean of {window} steps")
    if summary["baseline"] is not None:
        steps, losses = known(summary["baseline"]["losses"])
        # Dots over the curve: the two agree so closely that a second line would only hide the first.
        axis.plot(steps, losses, "o", color=ORANGE, markersize=3, markerfacecolor="none", label="uncut model")
    steps, losses = known(summary["eval"]["loss_history"])
    if len(losses) > 1:  # one alone shows no course
        axis.plot(steps, losses, "s", color=GREEN, markersize=5, label="held out")
    axis.set_ylabel("loss (nats per label token)")
    axis.legend(frameon=False)


def _draw_accuracy(axis: Axes, history: Sequence[Sequence[float]]) -> None:
    steps, accuracies = known(history)
    axis.plot(steps, [100 * accuracy for accuracy in accuracies], "o-", color=GREEN, linewidth=1.5, markersize=5)
    for step, accuracy in {steps[0]: accuracies[0], steps[-1]: accuracies[-1]}.items():
        below = accuracy > 0.8
        axis.annotate(
            f"{100 * accuracy:.1f} %",
            (step, 100 * accuracy),
            xytext=(0, -14 if below else 7),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set_ylim(0, 105)
    axis.set_yticks([0, 50, 100])
    axis.margins(x=0.06)
    axis.set_ylabel("held-out\naccuracy (%)")


def plot_time(summary: Summary, path: Path) -> Path:
    """One bar for each role (of many clients, for three): the parts of its mean step."""
    timed = {role: s for role, s in summary["seconds_per_step_by_role"].items() if s.get("total")}
    roles = {name: bar_parts(timed[role]) for name, role in _shown(timed).items()}
    figure, (axis,) = new_figure(8, 1.7 + 0.45 * len(roles))
    names = list(roles)
    ends = [0.0] * len(names)
    for component, colour in COMPONENT_COLOURS.items():
        widths = [roles[name].get(component, 0.0) for name in names]
        if any(widths):
            axis.barh(names, widths, left=ends, color=colour, label=component, height=0.65)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    _label_ends(axis, ends)
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("wall time per step (s, mean without warm-up)")
    axis.set_title(title(summary), loc="left", fontsize=11)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    return save(figure, path)


def _shown(timed: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """Name of a bar → its role. Of many clients those with the least, the median and the most work."""
    clients = sorted(
        (role for role in timed if role.startswith("client-")),
        key=lambda role: timed[role]["total"] - timed[role].get("wait", 0.0),
    )
    if len(clients) <= MANY_CLIENTS:
        return {role: role for role in timed}
    places = {"least busy": 0, "median": (len(clients) - 1) // 2, "busiest": len(clients) - 1}
    others = {role: role for role in timed if role not in clients}
    return {**others, **{f"{clients[place]}\n({name})": clients[place] for name, place in places.items()}}


def _label_ends(axis: Axes, ends: Sequence[float]) -> None:
    for row, end in enumerate(ends):
        axis.annotate(f"{end:.3f} s", (end, row), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, max(ends) * 1.12)


def bar_parts(seconds: Mapping[str, float]) -> dict[str, float]:
    """A role's durations without their total, and `other`: what of the total no part accounts for."""
    parts = {name: value for name, value in seconds.items() if name != "total"}
    if not parts:
        return {"whole step": seconds["total"]}
    return {**parts, "other": max(0.0, seconds["total"] - math.fsum(parts.values()))}
