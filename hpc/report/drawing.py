"""What the plots share: colours, figures without a display, and curves with gaps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]

# Colours that stay apart for colour-blind readers and in grey print (Okabe and Ito's palette).
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#B8B8B8"


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the beginning."""
    return [math.fsum(values[max(0, end - window) : end]) / min(end, window) for end in range(1, len(values) + 1)]


def known(points: Iterable[Sequence[Any]]) -> tuple[list[float], list[float]]:
    """Steps and values of the points whose value is a finite number."""
    kept = [(step, value) for step, value in points if finite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


def finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def title(summary: Summary) -> str:
    clients = summary["clients"]
    return f"{summary['name']}: {summary['model']}, {summary['schedule']}, {clients} client{'s'[: clients != 1]}"


def new_figure(
    width: float, height: float, heights: Sequence[float] = (1,), *, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """A figure drawn without a display, with rows of panels of the given relative heights; panels row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(len(heights), columns, squeeze=False, height_ratios=list(heights)).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, color="#EEEEEE")
        axis.set_axisbelow(True)
    return figure, axes


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path
