"""Suite `efficiency`: time of a sample against the uncut model's, ours beside what was published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.bench.efficiency_figures import REFERENCE, TITLES, figures, missing
from hpc.bench.published import CENTRALISED, PUBLISHED
from hpc.bench.suite import Raw
from hpc.report.drawing import BLUE, GREEN, ORANGE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"FL-GLM": ORANGE, "FedSEA": GREEN}
BAR = 0.36


def draw(raw: Raw, path: Path) -> Path:
    """Bars are medians of the ratios turn by turn, whiskers their range; below each the paper's ratio."""
    measured = raw["measured"]
    rows = {row["name"]: row for row in figures(measured)["rows"]}
    # What nobody asked for is not there at all; what could not be measured is shown as such.
    gone = missing(list(rows.values())) if "left_out" in measured["cable"] else []
    names = [name for name in TITLES if name in rows or (name in gone and name == "two_hosts")]
    figure, (axis,) = new_figure(9, 1.6 + 0.62 * len(names))
    reference = rows[REFERENCE]["sample_seconds"]["median"]
    end = max([1.0, *(PUBLISHED[name].ratio for name in names if name in PUBLISHED)])
    end = max([end, *(row["ratio"]["max"] for row in rows.values() if row["ratio"])])
    for place, name in enumerate(names):
        _draw_ours(axis, place, rows.get(name))
        _draw_theirs(axis, place, name)
    axis.axvline(1, linestyle="--", color="black", linewidth=0.8)
    axis.set_xlim(0, end * 1.2)
    axis.set_yticks(range(len(names)), [TITLES[name] for name in names])
    axis.invert_yaxis()
    axis.grid(visible=False, axis="y")
    axis.set_xlabel(f"time of a training sample, times that of the uncut model ({reference:.3f} s here)")
    axis.set_title(_title(raw), loc="left", fontsize=11, pad=24)
    _legend(axis, names)
    return save(figure, path)


def _draw_ours(axis: Axes, place: int, row: Mapping[str, Any] | None) -> None:
    at = place - BAR / 2
    if row is None:
        _label(axis, 0.0, at, "left out here")
        return
    ratio = row["ratio"] or {"median": 1.0, "min": 1.0, "max": 1.0}
    axis.barh(at, ratio["median"], color=BLUE, height=BAR)
    if row["ratio"]:
        whisker = [[ratio["median"] - ratio["min"]], [ratio["max"] - ratio["median"]]]
        axis.errorbar(ratio["median"], at, xerr=whisker, fmt="none", ecolor="black", elinewidth=1, capsize=3)
    _label(axis, ratio["max"], at, f"{ratio['median']:.2f}x, {row['sample_seconds']['median']:.3f} s")


def _draw_theirs(axis: Axes, place: int, name: str) -> None:
    at = place + BAR / 2
    if name == REFERENCE:
        text = ", ".join(f"{seconds:.3f} s in {paper}" for paper, seconds in CENTRALISED.items())
        _label(axis, 0.0, at, f"published: {text}")
        return
    theirs = PUBLISHED[name]
    axis.barh(at, theirs.ratio, color=COLOURS[theirs.paper], height=BAR)
    _label(axis, theirs.ratio, at, f"{theirs.ratio:.2f}x, {theirs.seconds:.3f} s")


def _label(axis: Axes, end: float, at: float, text: str) -> None:
    """Behind a bar; the line of the uncut model does not run through it."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axis.annotate(text, (end, at), (5, 0), textcoords="offset points", va="center", fontsize=9, bbox=box)


def _legend(axis: Axes, names: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    papers = dict.fromkeys(PUBLISHED[name].paper for name in names if name in PUBLISHED)
    patches = [Patch(color=BLUE, label="measured here (whiskers: range over turns)")]
    patches += [Patch(color=COLOURS[paper], label=f"{paper}, published") for paper in papers]
    axis.legend(
        handles=patches, frameon=False, fontsize=9, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1
    )


def _title(raw: Raw) -> str:
    own = raw["measured"]["setting"]
    return f"{own['model']}, {own['adapter']}, one sample a client and step, {raw['machine']['cores']} cores"
