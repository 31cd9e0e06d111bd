"""Figure: what the best attack recovers against what the task is worth, a point for each cut and defence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from hpc.report.drawing import BLUE, GREEN, GREY, ORANGE, new_figure, save
from hpc.reproduce.attack_rows import TOKENS, Attacked

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = "osD^vP*X"


def draw_leakage(rows: Sequence[Attacked], title: str, path: Path) -> bool:
    """Right: more is lost; up: more is recovered. False: there is nothing to draw."""
    rows = [row for row in rows if row.leak()]
    tasks = list(dict.fromkeys(row.task for row in rows))
    if not rows:
        return False
    figure, axes = new_figure(8.0, 1.4 + 3.0 * len(tasks), [1] * len(tasks))
    for axis, task in zip(axes, tasks, strict=True):
        _draw(axis, task, [row for row in rows if row.task == task])
    marks, names = axes[0].get_legend_handles_labels()
    figure.legend(marks, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    text = (
        f"What the best attack recovers, against the loss that is left: colour is the cut, shape the defence. {title}"
    )
    figure.suptitle(fill(text, 100), x=0.01, ha="left", fontsize=10)
    save(figure, path)
    return True


def _draw(axis: Axes, task: str, rows: Sequence[Attacked]) -> None:
    cuts = list(dict.fromkeys(row.head_blocks for row in rows))
    defences = list(dict.fromkeys(row.defence for row in rows))
    for row in rows:
        leak = row.leak()
        assert leak is not None
        _, score = leak
        colour = COLOURS[cuts.index(row.head_blocks) % len(COLOURS)]
        marker = MARKERS[defences.index(row.defence) % len(MARKERS)]
        spread = [[score.value - score.low], [score.high - score.value]]
        axis.errorbar(row.eval_loss, score.value, yerr=spread, color=colour, linewidth=0.8, capsize=2)
        axis.scatter(row.eval_loss, score.value, color=colour, marker=marker, s=34, zorder=3)
    for place, blocks in enumerate(cuts):
        axis.scatter([], [], color=COLOURS[place % len(COLOURS)], label=f"blocks on the client: {blocks}")
    for place, defence in enumerate(defences):
        axis.scatter([], [], color=GREY, marker=MARKERS[place % len(MARKERS)], label=f"defence: {defence}")
    floors = [floor[1].value for row in rows if (floor := row.floor(TOKENS))]
    if floors:
        axis.axhline(max(floors), color=GREY, linestyle="--", linewidth=1)
        axis.annotate(
            "best of who saw nothing", (1, max(floors)), (-3, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", fontsize=7, color=GREY,
        )  # fmt: skip
    axis.set_title(task, fontsize=10, loc="left")
    axis.set_ylabel("tokens recovered (%)", fontsize=9)
    axis.set_xlabel("loss on held-out examples (nats a label token)", fontsize=9)
    axis.set_ylim(-3, 104)
