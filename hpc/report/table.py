"""The closing tables of a run, from its summary."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDEST = 120
UNKNOWN = "-"
IN_ORDER_OF_A_STEP = ("head", "trunk", "tail", "seal", "open", "wire", "wait")
Summary = Mapping[str, Any]


def print_summary(summary: Summary, *, folder: str | Path | None = None, console: Console | None = None) -> None:
    """Print the tables; `folder` is where the run's files are. Plain text where stdout is no terminal."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print()
    console.print(Text(_headline(summary), style="bold"))
    tables = [_holdings(summary), _traffic(summary), _time(summary), _learning(summary), _comparison(summary)]
    for table in tables:
        if table is not None:
            console.print()
            console.print(table)
    for line in _notes(summary):
        console.print(line)
    if folder is not None:
        _print_files(console, Path(folder))


def _headline(summary: Summary) -> str:
    cut = "" if summary["schedule"] == "centralised" else f", {_count(summary['trunk_ranks'], 'trunk rank')}"
    return (
        f"{summary['name']}: {summary['model']}, {summary['adapter']}, {summary['schedule']}, "
        f"{_count(summary['clients'], 'client')}{cut}, {_count(summary['steps'], 'step')}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _table(title: str, *columns: str, words: int = 1) -> Table:
    """The first `words` columns hold words and stand left, the others numbers and stand right."""
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=box.SIMPLE_HEAD)
    table.show_edge = False
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", no_wrap=number < words)
    return table


def _holdings(summary: Summary) -> Table | None:
    if not summary["parameters_by_role"]:
        return None
    table = _table("Who held what (parameters)", "role", "part", "owned", "trainable", "peak memory", words=2)
    for role, parts in summary["parameters_by_role"].items():
        memory = _figure(summary["peak_rss_mib"].get(role), ",.0f", " MiB")
        for number, (part, held) in enumerate(parts.items()):
            first = number == 0
            table.add_row(
                role if first else "", part, f"{held['owned']:,}", f"{held['trainable']:,}", memory if first else ""
            )
    return table


def _traffic(summary: Summary) -> Table | None:
    if summary["schedule"] == "centralised":
        return None
    payload, wire = (summary["link_bytes_per_step"][name] for name in ("payload", "wire"))
    overhead = (wire / payload - 1) * 100 if payload and wire else None
    columns = ("sealed with", "transport", "payload", "on the wire", "overhead")
    table = _table("What crossed the links (per step, all links, both directions)", *columns, words=2)
    sealed = "nothing: PLAINTEXT" if summary["encryption"] == "off" else summary["encryption"]
    style = "bold red" if summary["encryption"] == "off" else None
    table.add_row(sealed, summary["transport"], size(payload), size(wire), _figure(overhead, ".3f", " %"), style=style)
    return table


def _time(summary: Summary) -> Table | None:
    """One column for each kind of role: its durations per step, and their share of its own step."""
    kinds = _mean_by_kind(summary["seconds_per_step_by_role"])
    if not kinds:
        return None
    table = _table("Where a step's time went", "seconds per step", *kinds)
    measured = {name for seconds in kinds.values() for name in seconds}
    parts = [name for name in IN_ORDER_OF_A_STEP if name in measured]
    for name in parts:
        table.add_row(name, *(_share(seconds.get(name), seconds["total"]) for seconds in kinds.values()))
    if parts:
        table.add_row("other", *(_share(_rest(seconds), seconds["total"]) for seconds in kinds.values()))
        table.add_section()
    totals = (_share(seconds["total"], seconds["total"]) for seconds in kinds.values())
    table.add_row("total", *totals, style="bold")
    return table


def _mean_by_kind(by_role: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Column title → mean durations of the roles of one kind (trunk ranks, clients, centralised)."""
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for role, seconds in by_role.items():
        if seconds.get("total"):
            kinds.setdefault(role.partition("-")[0], []).append(seconds)
    titles = {"trunk": "trunk rank", "client": "client"}
    return {
        f"mean of {_count(len(roles), titles[kind])}" if len(roles) > 1 else titles.get(kind, kind): {
            name: sum(seconds.get(name, 0.0) for seconds in roles) / len(roles) for name in roles[0]
        }
        for kind, roles in kinds.items()
    }


def _rest(seconds: Mapping[str, float]) -> float:
    """What no component measured; below zero only where components overlap."""
    return max(0.0, seconds["total"] - sum(value for name, value in seconds.items() if name != "total"))


def _share(seconds: float | None, total: float) -> str:
    return UNKNOWN if seconds is None else f"{seconds:.3f} {100 * seconds / total:3.0f} %"


def _learning(summary: Summary) -> Table:
    evaluation = summary["eval"]
    table = _table("What was learnt (held-out accuracy; training loss)", "", "first", "last", "change")
    for client, found in evaluation["per_client"].items():
        table.add_row(f"accuracy, {client}", *_accuracy_cells(found))
    examples = f" ({evaluation['examples']:,} examples)" if evaluation["examples"] else ""
    table.add_row(f"accuracy, all{examples}", *_accuracy_cells(evaluation), style="bold")
    first, last = summary["loss_first"], summary["loss_last"]
    change = last - first if first is not None and last is not None else None
    table.add_row(
        "loss (nats per label token)",
        _figure(first, ".4f"),
        _figure(last, ".4f"),
        _figure(change, "+.4f"),
        style="bold",
    )
    return table


def _accuracy_cells(found: Mapping[str, float | None]) -> tuple[str, str, str]:
    before, after = found["accuracy_before"], found["accuracy"]
    change = (after - before) * 100 if before is not None and after is not None else None
    return _percent(before), _percent(after), _figure(change, "+.1f", " points")


def _comparison(summary: Summary) -> Table | None:
    """The same batches through the uncut model in one process, step by step in turn."""
    baseline = summary["baseline"]
    if baseline is None:
        return None
    title = f"Split against uncut ({_count(baseline['steps'], 'step')}, taken in turn on this machine)"
    table = _table(title, "", "uncut", "split", "split / uncut")
    table.add_row(
        "median step",
        _figure(baseline["step_seconds"], ".3f", " s"),
        _figure(baseline["split_step_seconds"], ".3f", " s"),
        _figure(baseline["ratio"], ".2f", "x"),
    )
    table.add_row("largest loss difference", "", "", _figure(baseline["loss_max_abs_difference"], ".2e"))
    return table


def _notes(summary: Summary) -> list[str]:
    """What fits into no table."""
    median, p90 = (_figure(summary["step_seconds"][name], ".3f", " s") for name in ("median", "p90"))
    rate = _figure(summary["tokens_per_second"], ",.0f", " tokens/s")
    warm_up = summary["warm_up_steps"]
    counted = f" (without the first {warm_up} steps)" if warm_up else ""
    notes = ["", f"Step time: median {median}, p90 {p90}; {rate}{counted}"]
    if summary["loss_first"] is None:
        notes.append(
            "Some client's event file is not in this folder, so losses and overall accuracy are not known here."
        )
    return notes


def _print_files(console: Console, folder: Path) -> None:
    """Names what is there; a role elsewhere may keep its files on its own disc."""
    names = [path.name + ("/" if path.is_dir() else "") for path in sorted(folder.iterdir()) if path.name[0] != "."]
    console.print(f"Files in {folder}: {', '.join(names)}", soft_wrap=False)


def size(number: float | None) -> str:
    """Bytes in the largest unit of 1024 that leaves at least 1, e.g. `2.25 MiB`."""
    if number is None:
        return UNKNOWN
    power = min(4, int(math.log(number, 1024))) if number >= 1 else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number:.0f} B" if power == 0 else f"{number / 1024**power:.2f} {unit}"


def _percent(value: float | None) -> str:
    return _figure(None if value is None else value * 100, ".1f", " %")


def _figure(value: float | None, form: str, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{form}}{unit}"
