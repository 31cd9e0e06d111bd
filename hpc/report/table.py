"""The closing tables of a run, from its summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc.report.cells import MANY_CLIENTS, UNKNOWN, count, figure, percent, size, table_of
from hpc.report.learning import learning

WIDEST = 120
IN_ORDER_OF_A_STEP = ("head", "trunk", "tail", "seal", "open", "wire", "wait")
NAMED_NOTES = 5  # of one kind; a run that goes wrong at every step must not fill the screen
Summary = Mapping[str, Any]


def print_summary(summary: Summary, *, folder: str | Path | None = None, console: Console | None = None) -> None:
    """Print the tables; `folder` is where the run's files are. Plain text where stdout is no terminal."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDEST)
    console.print()
    console.print(Text(_headline(summary), style="bold"))
    tables = [_holdings(summary), _traffic(summary), _time(summary), learning(summary), _comparison(summary)]
    for table in tables:
        if table is not None:
            console.print()
            console.print(table)
    for line in _notes(summary):
        console.print(line)
    if folder is not None:
        _print_files(console, Path(folder))


def _headline(summary: Summary) -> str:
    cut = "" if summary["schedule"] == "centralised" else f", {count(summary['trunk_ranks'], 'trunk rank')}"
    return (
        f"{summary['name']}: {summary['model']}, {summary['adapter']}, {summary['schedule']}, "
        f"{count(summary['clients'], 'client')}{cut}, {count(summary['steps'], 'step')}"
    )


def _holdings(summary: Summary) -> Table | None:
    if not summary["parameters_by_role"]:
        return None
    table = table_of("Who held what (parameters)", "role", "part", "owned", "trainable", "peak memory", words=2)
    for name, parts, memory in _holders(summary):
        for number, (part, held) in enumerate(parts.items()):
            first = number == 0
            table.add_row(
                name if first else "", part, f"{held['owned']:,}", f"{held['trainable']:,}", memory if first else ""
            )
    return table


def _holders(summary: Summary) -> Iterator[tuple[str, Mapping[str, Mapping[str, int]], str]]:
    """Name, parts and peak memory of each role; many clients that hold alike are one."""
    alike: list[tuple[list[str], Mapping[str, Mapping[str, int]]]] = []
    for role, parts in summary["parameters_by_role"].items():
        mergeable = role.startswith("client-") and summary["clients"] > MANY_CLIENTS
        same = [roles for roles, held in alike if held == parts and roles[0].startswith("client-")]
        if mergeable and same:
            same[0].append(role)
        else:
            alike.append(([role], parts))
    for roles, parts in alike:
        peak = max((summary["peak_rss_mib"][role] for role in roles if role in summary["peak_rss_mib"]), default=None)
        name = roles[0] if len(roles) == 1 else f"{roles[0]} and {len(roles) - 1} alike"
        yield name, parts, ("up to " if len(roles) > 1 and peak is not None else "") + figure(peak, ",.0f", " MiB")


def _traffic(summary: Summary) -> Table | None:
    if summary["schedule"] == "centralised":
        return None
    payload, wire, cached = (summary["link_bytes_per_step"][name] for name in ("payload", "wire", "cached"))
    overhead = (wire / payload - 1) * 100 if payload and wire else None
    columns = {
        "transport": summary["transport"],
        "payload": size(payload),
        "on the wire": size(wire),
        "overhead": figure(overhead, ".3f", " %"),
        **({"spared by cache": size(cached)} if cached else {}),
    }
    title = "What crossed the links (per step, all links, both directions)"
    table = table_of(title, "sealed with", *columns, words=2)
    sealed = "nothing: PLAINTEXT" if summary["encryption"] == "off" else summary["encryption"]
    style = "bold red" if summary["encryption"] == "off" else None
    table.add_row(sealed, *columns.values(), style=style)
    return table


def _time(summary: Summary) -> Table | None:
    """One column for each kind of role: its durations per step, and their share of its own step."""
    kinds = _mean_by_kind(summary["seconds_per_step_by_role"])
    if not kinds:
        return None
    table = table_of("Where a step's time went", "seconds per step", *kinds)
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
        f"mean of {count(len(roles), titles[kind])}" if len(roles) > 1 else titles.get(kind, kind): {
            name: sum(seconds.get(name, 0.0) for seconds in roles) / len(roles) for name in roles[0]
        }
        for kind, roles in kinds.items()
    }


def _rest(seconds: Mapping[str, float]) -> float:
    """What no component measured; below zero only where components overlap."""
    return max(0.0, seconds["total"] - sum(value for name, value in seconds.items() if name != "total"))


def _share(seconds: float | None, total: float) -> str:
    return UNKNOWN if seconds is None else f"{seconds:.3f} {100 * seconds / total:3.0f} %"


def _comparison(summary: Summary) -> Table | None:
    """The same batches through the uncut model in one process, step by step in turn."""
    baseline = summary["baseline"]
    if baseline is None:
        return None
    title = f"Split against uncut ({count(baseline['steps'], 'step')}, taken in turn on this machine)"
    table = table_of(title, "", "uncut", "split", "split / uncut")
    table.add_row(
        "median step",
        figure(baseline["step_seconds"], ".3f", " s"),
        figure(baseline["split_step_seconds"], ".3f", " s"),
        figure(baseline["ratio"], ".2f", "x"),
    )
    table.add_row("largest loss difference", "", "", figure(baseline["loss_max_abs_difference"], ".2e"))
    return table


def _notes(summary: Summary) -> list[str]:
    """What fits into no table."""
    median, p90 = (figure(summary["step_seconds"][name], ".3f", " s") for name in ("median", "p90"))
    rate = figure(summary["tokens_per_second"], ",.0f", " tokens/s")
    warm_up = summary["warm_up_steps"]
    counted = f" (without the first {warm_up} steps)" if warm_up else ""
    notes = ["", f"Step time: median {median}, p90 {p90}; {rate}{counted}"]
    if summary["trunk_idle_share"] is not None:
        notes.append(f"Trunk idle {percent(summary['trunk_idle_share'])} of its time, waiting for clients")
    if summary["link_bytes_per_step"]["cached"]:
        first, last = (size(summary[f"link_bytes_{name}_step"]) for name in ("first", "last"))
        notes.append(f"Payload of the first step {first}, of the last {last}: the server's cache spared the rest")
    if summary.get("privacy") is not None:  # a summary of before there was noise has none
        notes.append(_privacy(summary["privacy"]))
    if all(loss is None for loss in summary["losses"]):
        notes.append(
            "Some client's event file is not in this folder, so losses and overall accuracy are not known here."
        )
    return notes + _incidents(summary)


def _privacy(figures: Mapping[str, Any]) -> str:
    if figures["epsilon"] is None:
        return "Noise or clipping on what the clients send, but no guarantee: no epsilon can be named"
    unit = {"token": "token row by itself", "example": "example"}[figures["unit"]]
    return (
        f"Privacy of one {unit}: epsilon {figures['epsilon']:.4g} at delta {figures['delta']:g} over "
        f"{count(figures['releases'], 'release')} ({figures['client']}, which has the most; its log says what is not "
        "covered)"
    )


def _incidents(summary: Summary) -> list[str]:
    lines = []
    if summary["averages"]["count"]:
        mean = figure(summary["averages"]["seconds"], ".3f", " s")
        lines.append(f"Parameters were averaged {count(summary['averages']['count'], 'time')}, {mean} each")
    if summary["skipped_steps"]:
        named = [f"{_client_of(note)}{note['what']} in step {note['step']}" for note in summary["nonfinite"]]
        steps = count(summary["skipped_steps"], "step")
        # Without a name: a client was lost with half of its gradient given, or fp16's loss scale was too high.
        why = ", as not finite" if named else " (a client was lost in the middle, or fp16 overflowed)"
        lines.append(_some(f"Left out{why}: {steps}", named))
    lost = [f"{_client_of(note)}in step {note['step']}: {note['why']}" for note in summary["lost_clients"]]
    if lost:
        lines.append(_some(f"Lost: {count(len(lost), 'client')}", lost))
    back = [f"{_client_of(note)}from step {note['step']} on" for note in summary["returned_clients"]]
    if back:
        lines.append(_some(f"Came back: {count(len(back), 'client')}", back))
    refused = [f"{_client_of(note)}{note['why']}" for note in summary["refused_clients"]]
    if refused:
        lines.append(_some(f"Refused: {count(len(refused), 'client')}", refused))
    failed = [f"step {note['step']}: {note['why']}" for note in summary["failed_checkpoints"]]
    if failed:
        lines.append(_some(f"Not saved: {count(len(failed), 'checkpoint')}", failed))
    if summary["stopped_early_at"] is not None:
        lines.append(f"Stopped early after step {summary['stopped_early_at']}: held-out losses no longer fell")
    return lines


def _client_of(note: Mapping[str, Any]) -> str:
    return "" if note["client_id"] is None else f"client-{note['client_id']} "


def _some(title: str, notes: list[str]) -> str:
    more = [f"and {len(notes) - NAMED_NOTES} more"] if len(notes) > NAMED_NOTES else []
    return f"{title} ({'; '.join([*notes[:NAMED_NOTES], *more])})" if notes else title


def _print_files(console: Console, folder: Path) -> None:
    """Names what is there; a role elsewhere may keep its files on its own disc."""
    names = [path.name + ("/" if path.is_dir() else "") for path in sorted(folder.iterdir()) if path.name[0] != "."]
    console.print(f"Files in {folder}: {', '.join(names)}", soft_wrap=False)
