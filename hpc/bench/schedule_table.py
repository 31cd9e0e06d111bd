"""Suite `schedules`: its figures as Markdown. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hpc.bench.markdown import UNKNOWN, footer, shown, span
from hpc.bench.markdown import table as markdown_table
from hpc.bench.schedule_figures import figures
from hpc.bench.suite import Raw
from hpc.bench.turn_figures import rounds_note

COMPONENTS = ("head", "trunk", "tail", "seal", "open", "wire", "wait", "other", "between", "total")
MIB = 2**20
Rows = Sequence[Mapping[str, Any]]


def table(raw: Raw) -> str:
    """From the measurements, not from the medians that the raw file has as well."""
    found, measured = figures(raw["measured"]), raw["measured"]
    rows = found["schedules"]
    parts = [
        "# Schedules side by side",
        _setting(measured),
        _times(rows),
        _notes(measured),
        "## Goals",
        _goals(found["goals"]),
        "## Where the time of a turn went",
        "Mean seconds of a turn, of the trunk and of the mean client. `between` lies outside a role's steps: "
        "hand-overs, averages, progress, in `serial` the other clients' steps. In `pipelined` a thread reads the links "
        "meanwhile, so `open` and `wire` come on top.",
        _profile(rows),
        "## The trunk's replicas",
        _replicas(found, measured),
        *footer(raw),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(measured: Mapping[str, Any]) -> str:
    own = measured["setting"]
    head, tail = own["cut"]
    return (
        f"{own['model']} ({own['dtype']}, cut {head} / trunk / {tail}, {own['adapter']}), {own['task']}, "
        f"{own['clients']} clients with {own['per_client_batch_size']} examples each. A turn is one batch of every "
        f"client: one step, in `serial` one of each client. The federations live at the same time, each in processes "
        f"of its own with sealed links, and take turns; {own['turns']} turns count, after {own['warm_up_turns']} to "
        f"warm up. `replica` averages every {own['sync_every']} turns."
    )


def _times(rows: Rows) -> str:
    columns = (
        "schedule",
        "turn, median",
        "range",
        "x centralised",
        "range",
        "trunk idle",
        "payload",
        "trunk",
        "client",
    )
    return markdown_table(columns, [_time_row(row) for row in rows])


def _time_row(row: Mapping[str, Any]) -> list[str]:
    ratio, idle, sent, peaks = row["ratio"], row["trunk_idle_share"], row["payload_bytes_per_turn"], row["peak_rss_mib"]
    trunk = peaks["uncut"] if peaks["trunk"] is None else peaks["trunk"]
    return [
        f"`{row['schedule']}`",
        f"{row['seconds']['median']:.2f} s",
        f"{span(row['seconds'], '.2f')} s",
        shown(ratio and ratio["median"], ".3f"),
        span(ratio, ".3f") if ratio else UNKNOWN,
        shown(None if idle is None else 100 * idle, ".0f", " %"),
        shown(None if sent is None else sent / MIB, ".2f", " MiB"),
        shown(trunk, ",.0f", " MiB"),
        shown(peaks["client"], ",.0f", " MiB"),
    ]


def _notes(measured: Mapping[str, Any]) -> str:
    lines = [
        "`x centralised` is the median (range) of the ratios turn by turn. `payload` is the tensors of a turn over all "
        "links, both directions, hand-overs included. The last two columns are peak memory (of "
        "`centralised`: of its one process).",
    ]
    for ring in measured["rings"]:
        averages = ring["members"].get("replica", {}).get("average_seconds")
        if averages:
            mean = sum(averages) / len(averages)
            lines.append(f"An average of `replica` took {mean:.2f} s; it is part of the turn before it.")
        lines.append(rounds_note(ring["members"]))
    return " ".join(lines)


def _goals(goals: Rows) -> str:
    rows = [
        [
            goal["what"],
            f"{goal['found']:.3f}",
            f"at most {goal['at_most']:.2f}" if goal["at_most"] is not None else f"at least {goal['at_least']:.2f}",
            "met" if goal["met"] else "not met",
        ]
        for goal in goals
    ]
    return markdown_table(("goal", "found", "limit", ""), rows)


def _profile(rows: Rows) -> str:
    columns = {
        f"{row['schedule']} {kind}" if kind != row["schedule"] else kind: parts
        for row in rows
        for kind, parts in row["profile"].items()
    }
    lines = [
        [name, *(shown(parts[name], ".3f") if name in parts else UNKNOWN for parts in columns.values())]
        for name in COMPONENTS
    ]
    return markdown_table(("", *columns), lines)


def _replicas(found: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    own, passes, memory = measured["replica_pass"], found["replica_pass"], found["replica_memory"]
    rows = [
        [
            f"one pass for {own['clients']} clients",
            f"{passes['together']['median']:.3f} s",
            f"{span(passes['together'], '.3f')} s",
        ],
        [
            f"{own['clients']} passes",
            f"{passes['one_by_one']['median']:.3f} s",
            f"{span(passes['one_by_one'], '.3f')} s",
        ],
    ]
    repetitions = len(own["seconds"]["together"]) - own["warm_up"]
    peaks = "; ".join(f"{name}: {peak:,.0f} MiB" for name, peak in memory["trunk_peak_rss_mib"].items())
    return "\n\n".join(
        [
            f"Small batches, {own['clients']} clients x {own['rows']} row x {own['tokens']} tokens, forward and "
            f"backward in one process, in turn, {repetitions} times each:",
            markdown_table(("", "median", "range"), rows),
            f"Meanwhile other processes took {100 * own['shares']['others']:.1f} % of the cores.",
            f"Peak memory of the trunk's process after {measured['replica_memory']['steps'] + 1} steps: {peaks}.",
        ]
    )
