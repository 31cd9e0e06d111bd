"""Suite `scale`: time of a step, memory and start-up by number of clients, with the lines fitted to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.bench.scale_figures import figures, steps_counted
from hpc.bench.suite import Raw
from hpc.report.drawing import BLUE, GREY, ORANGE, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(raw: Raw, path: Path) -> Path:
    """Large marks are medians, or the one value there is; small dots are single steps."""
    measured = raw["measured"]
    found = figures(measured)
    rows, lines = found["rows"], found["lines"]
    figure, (times, memory, start_up) = new_figure(9, 9, heights=(1.2, 1, 0.8))
    for run in measured["runs"]:
        seconds = [turn["seconds"] for turn in steps_counted(run)]
        times.plot([run["clients"]] * len(seconds), seconds, ".", color="black", markersize=4, alpha=0.6, zorder=3)
    medians = [row["step_seconds"]["median"] for row in rows]
    _panel(times, rows, medians, lines["step_seconds"], BLUE, "median", "{:.3f} s,\n{:+.4f} s a client")
    times.set_ylabel("time of a step (s)")
    for role, colour in (("trunk", ORANGE), ("client", BLUE)):
        name = f"{role}_peak_rss_mib"
        text = f"{role}: {{:,.0f}} MiB,\n{{:+.1f}} MiB a client"
        _panel(memory, rows, [row[name] for row in rows], lines[name], colour, role, text)
    memory.set_ylabel("peak resident set of a process (MiB)")
    starts = [row["start_up_seconds"] for row in rows]
    _panel(start_up, rows, starts, lines["start_up_seconds"], BLUE, "measured", "{:.1f} s,\n{:+.2f} s a client")
    start_up.set_ylabel("start-up (s)")
    start_up.set_xlabel("clients on one trunk rank")
    own = measured["setting"]
    text = f"{own['model']}, client_batch, {own['per_client_batch_size']} examples a client"
    times.set_title(f"{text}, {raw['machine']['cores']} cores", loc="left", fontsize=11)
    return save(figure, path)


def _panel(
    axis: Axes,
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    line: Mapping[str, float] | None,
    colour: str,
    label: str,
    text: str,
) -> None:
    """One quantity and its line; `text` says the line's intercept and slope."""
    clients = [row["clients"] for row in rows]
    if line is not None:
        label = text.format(line["intercept"], line["per_client"])
        ends = [0, clients[-1]]
        axis.plot(ends, [line["intercept"] + line["per_client"] * end for end in ends], "--", color=colour)
    axis.plot(clients, values, "o", color=colour, label=label)
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.set_xticks(clients)
    axis.set_ylim(bottom=min(0.0, line["intercept"] if line else 0.0))
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize=9)
