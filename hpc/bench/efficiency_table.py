"""Suite `efficiency`: its figures as Markdown and as comma-separated values. Pure."""

from __future__ import annotations

import csv as values
import io
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.bench.efficiency_figures import REFERENCE, TITLES, figures, missing
from hpc.bench.markdown import UNKNOWN, footer, shown, span
from hpc.bench.markdown import table as markdown_table
from hpc.bench.published import CENTRALISED, PUBLISHED
from hpc.bench.suite import Raw
from hpc.bench.turn_figures import rounds_note

COMPONENTS = ("head", "trunk", "tail", "seal", "open", "wire", "wait", "other", "between", "total")
MIB, MB = 2**20, 1e6
Rows = Sequence[Mapping[str, Any]]


def table(raw: Raw) -> str:
    """From the measurements, not from the medians that the raw file has as well."""
    measured = raw["measured"]
    found = figures(measured)
    rows = found["rows"]
    parts = [
        "# Time of a training sample",
        _setting(measured),
        _times(rows, measured["cable"]),
        _notes(measured, found),
        "## Where the time of a step went",
        "Mean milliseconds of a step, of the trunk and of the mean client. `between` lies outside a role's steps: "
        "hand-overs, averages, in `serial` the other client's steps.",
        _profile(rows),
        *footer(raw),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(measured: Mapping[str, Any]) -> str:
    own = measured["setting"]
    (head, tail), tokens = own["cut"], own["tokens"]
    return (
        f"{own['model']} ({own['dtype']}, cut {head} / trunk / {tail}), {own['adapter']}, {own['encryption']}; "
        f"{own['task']}, batch size 1 a client. Everybody trains on the same {own['samples_per_turn']} samples of "
        f"{min(tokens)} to {max(tokens)} tokens, {sum(tokens)} in all, which make up a turn; federations live at the "
        f"same time and take turns. {own['turns']} turns count, after {own['warm_up_turns']} to warm up. Hand-overs "
        "and averages come once a turn. All processes, of two hosts as well, share this one machine's cores."
    )


def _times(rows: Rows, cable: Mapping[str, Any]) -> str:
    columns = (
        *("", "a sample", "range", "x centralised", "range", "published x", "published, a sample", "samples a step"),
        *("a step", "payload a step", "trunk idle", "trunk", "client"),
    )
    lines = {row["name"]: _time_row(row) for row in rows}
    if "left_out" in cable:
        lines["two_hosts"] = [TITLES["two_hosts"], "left out", *[UNKNOWN] * 3, *_published("two_hosts"), *[UNKNOWN] * 6]
    return markdown_table(columns, [lines[name] for name in TITLES if name in lines])


def _time_row(row: Mapping[str, Any]) -> list[str]:
    ratio, idle, sent, peaks = row["ratio"], row["trunk_idle_share"], row["payload_bytes_per_step"], row["peak_rss_mib"]
    return [
        TITLES[row["name"]],
        f"{row['sample_seconds']['median']:.3f} s",
        f"{span(row['sample_seconds'], '.3f')} s",
        shown(ratio and ratio["median"], ".2f"),
        span(ratio, ".2f") if ratio else UNKNOWN,
        *_published(row["name"]),
        str(row["samples_per_step"]),
        f"{row['step_seconds']['median']:.3f} s",
        shown(None if sent is None else sent / MIB, ".2f", " MiB"),
        shown(None if idle is None else 100 * idle, ".0f", " %"),
        shown(peaks["uncut"] if peaks["trunk"] is None else peaks["trunk"], ",.0f", " MiB"),
        shown(peaks["client"], ",.0f", " MiB"),
    ]


def _published(name: str) -> list[str]:
    if name == REFERENCE:
        return [UNKNOWN, ", ".join(f"{seconds:.3f} s ({paper})" for paper, seconds in CENTRALISED.items())]
    theirs = PUBLISHED[name]
    return [f"{theirs.ratio:.2f} ({theirs.paper})", f"{theirs.seconds:.3f} s"]


def _notes(measured: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    lines = [
        "`x centralised` is the median (range) of the ratios turn by turn; both are seconds of a sample. `payload`: "
        "tensors over all links, both directions, hand-overs included. The last two columns are peak memory (of "
        "`centralised`: of its one process).",
        "Published: FL-GLM, ChatGLM-6B on A100s, two GPUs of one machine or two machines with 1100 MB/s between them, "
        "seconds of a step with one sample; FedSEA-LLaMA, seconds for 1,000 samples of ReCoRD, one sample a client. "
        "Their server replicas run at once; here the replicas share the passes of one process.",
        _cable(measured["cable"]),
    ]
    if len(found["references"]) > 1:
        each = ", ".join(f"{seconds['median']:.3f} s" for seconds in found["references"])
        lines.append(f"Measured in {len(found['references'])} rings; in each, the uncut model had a sample in: {each}.")
    lines += [rounds_note(ring["members"]) for ring in measured["rings"]]
    if gone := [name for name in missing(found["rows"]) if name != "two_hosts"]:
        lines.append(
            f"Not measured, as this run was asked for fewer clients: {'; '.join(TITLES[name] for name in gone)}."
        )
    return "\n\n".join(lines)


def _cable(cable: Mapping[str, Any]) -> str:
    asked = f"{cable['asked_bytes_per_second'] / MB:,.0f} MB/s"
    if "left_out" in cable:
        return f"**Two hosts and a cable of {asked} are left out**: {cable['left_out']}."
    return (
        f"The two hosts are network namespaces; tc limits the cable between them to {asked} each way. A plain stream, "
        f"measured before, got {cable['found_bytes_per_second'] / MB:,.0f} MB/s through it."
    )


def _profile(rows: Rows) -> str:
    lines = [
        [
            TITLES[row["name"]],
            role if role != row["name"] else "",
            *(shown(1000 * parts[name], ".1f") if name in parts else UNKNOWN for name in COMPONENTS),
        ]
        for row in rows
        for role, parts in row["step_profile"].items()
    ]
    return markdown_table(("", "role", *COMPONENTS), lines, words=2)


def csv(raw: Raw) -> str:
    """One line a row; seconds and bytes."""
    columns = (
        *("row", "clients", "samples_per_step", "sample_seconds", "sample_seconds_min", "sample_seconds_max", "ratio"),
        *("ratio_min", "ratio_max", "payload_bytes_per_step", "paper", "published_sample_seconds", "published_ratio"),
    )
    text = io.StringIO()
    writer = values.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in figures(raw["measured"])["rows"]:
        ratio, theirs = row["ratio"] or {}, row["published"] or {}
        spread = [row["sample_seconds"][key] for key in ("median", "min", "max")]
        ratios = [ratio.get(key) for key in ("median", "min", "max")]
        published = [theirs.get(key) for key in ("paper", "sample_seconds", "ratio")]
        counts = [row["name"], row["clients"], row["samples_per_step"]]
        writer.writerow([*counts, *spread, *ratios, row["payload_bytes_per_step"], *published])
    return text.getvalue()
