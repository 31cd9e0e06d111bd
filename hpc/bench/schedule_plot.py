"""Suite `schedules`: time of a turn by schedule, and how long the trunk waited."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.bench.schedule_figures import LIMITS, REFERENCE, figures
from hpc.bench.suite import Raw
from hpc.bench.turn_figures import counted, quiet_rounds
from hpc.report.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


def draw(raw: Raw, path: Path) -> Path:
    """Bars are medians, whiskers the range over turns, dots the single turns."""
    measured = raw["measured"]
    rows = figures(measured)["schedules"]
    figure, (times, idle) = new_figure(8, 3.2 + 0.55 * len(rows), heights=(len(rows), len(rows) - 0.5))
    _draw_times(times, rows, measured["rings"])
    _draw_idle(idle, [row for row in rows if row["trunk_idle_share"] is not None])
    own = measured["setting"]
    clients, cores = own["clients"], raw["machine"]["cores"]
    text = f"{own['model']}, {clients} clients x {own['per_client_batch_size']} examples, {cores} cores"
    times.set_title(text, loc="left", fontsize=11)
    return save(figure, path)


def _draw_times(axis: Axes, rows: Rows, rings: Sequence[Mapping[str, Any]]) -> None:
    places = range(len(rows))
    medians = [row["seconds"]["median"] for row in rows]
    low = [row["seconds"]["median"] - row["seconds"]["min"] for row in rows]
    high = [row["seconds"]["max"] - row["seconds"]["median"] for row in rows]
    colours = [GREY if row["schedule"] == REFERENCE else BLUE for row in rows]
    axis.barh(places, medians, color=colours, height=0.6)
    axis.errorbar(medians, places, xerr=[low, high], fmt="none", ecolor="black", elinewidth=1, capsize=4)
    for place, row in enumerate(rows):
        members = rings[row["ring"]]["members"]
        turns = counted(members[row["schedule"]], quiet_rounds(members))
        # Beside the whisker, which would hide them.
        seconds = [turn["seconds"] for turn in turns]
        axis.plot(seconds, [place + 0.2] * len(turns), ".", color="black", markersize=4, alpha=0.6)
    end = 1.03 * max([*(row["seconds"]["max"] for row in rows), *_draw_references(axis, rows)])
    for place, row in enumerate(rows):
        label = f"{row['seconds']['median']:.2f} s" + (f", {row['ratio']['median']:.2f}x" if row["ratio"] else "")
        axis.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, end * 1.18)
    _name_rows(axis, rows)
    axis.set_xlabel("wall time of a turn (s): bar median, whiskers range, dots turns")


def _draw_references(axis: Axes, rows: Rows) -> list[float]:
    """The uncut model's line through its own ring, and each schedule's goal; returns where the goals are."""
    goals = []
    for place, row in enumerate(rows):
        reference = next(each for each in rows if each["ring"] == row["ring"] and each["schedule"] == REFERENCE)
        seconds = reference["seconds"]["median"]
        first = place == 0
        axis.plot([seconds] * 2, [place - 0.5, place + 0.5], "--", color=ORANGE, label="centralised" if first else "")
        if row["schedule"] in LIMITS:
            goals.append(seconds * LIMITS[row["schedule"]])
            label = "goal" if len(goals) == 1 else ""
            axis.plot([goals[-1]] * 2, [place - 0.4, place + 0.4], color=GREEN, linewidth=2, label=label)
    axis.legend(frameon=False, loc="lower right", fontsize=9, ncols=2, bbox_to_anchor=(1, 1), borderaxespad=0.1)
    return goals


def _draw_idle(axis: Axes, rows: Rows) -> None:
    shares = [100 * row["trunk_idle_share"] for row in rows]
    axis.barh(range(len(rows)), shares, color="#56B4E9", height=0.6)
    for place, share in enumerate(shares):
        axis.annotate(f"{share:.0f} %", (share, place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_xlim(0, 100)
    _name_rows(axis, rows)
    axis.set_xlabel("trunk idle: share of its steps in which it waits for clients (%)")


def _name_rows(axis: Axes, rows: Rows) -> None:
    axis.set_yticks(range(len(rows)), [row["schedule"] for row in rows])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
