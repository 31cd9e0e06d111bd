"""Suite `scale`: medians, lines through them, and whether a step's time grows at most in proportion. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.bench.suite import Figures
from hpc.bench.turn_figures import counted, quiet_rounds, spread

REFERENCE = 4  # clients; with fewer, what a step costs whatever their number hides what each of them costs


def sizes(largest: int) -> list[int]:
    """1, 2, 4, … up to `largest`, which is always the last."""
    doubling = [2**power for power in range(largest.bit_length()) if 2**power < largest]
    return [*doubling, largest]


def figures(measured: Mapping[str, Any]) -> Figures:
    """A row for each number of clients, lines fitted to the rows, and the goal."""
    rows = [_row(each) for each in measured["runs"]]
    clients = [row["clients"] for row in rows]
    lines = {
        "step_seconds": line(clients, [row["step_seconds"]["median"] for row in rows]),
        "trunk_peak_rss_mib": line(clients, [row["trunk_peak_rss_mib"] for row in rows]),
        "client_peak_rss_mib": line(clients, [row["client_peak_rss_mib"] for row in rows]),
        "start_up_seconds": line(clients, [row["start_up_seconds"] for row in rows]),
    }
    return {"rows": rows, "lines": lines, "goal": goal(rows)}


def _row(run: Mapping[str, Any]) -> Figures:
    clients, member = run["clients"], run["member"]
    peaks = member["peak_rss_mib"]
    turns = steps_counted(run)
    return {
        "clients": clients,
        "step_seconds": spread([turn["seconds"] for turn in turns]),
        "seconds_per_client": spread([turn["seconds"] / clients for turn in turns]),
        "others_share": statistics.fmean(turn["others_share"] for turn in turns),
        "trunk_idle_share": _idle(turns),
        "trunk_peak_rss_mib": peaks["trunk-0"],
        "client_peak_rss_mib": max(peak for role, peak in peaks.items() if role.startswith("client-")),
        "start_up_seconds": run["start_up_seconds"],
    }


def steps_counted(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The steps behind the warm-up in which other processes left the cores alone."""
    return counted(run["member"], quiet_rounds({"run": run["member"]}))


def _idle(turns: Sequence[Mapping[str, Any]]) -> float:
    trunk = [turn["seconds_by_role"]["trunk-0"] for turn in turns]
    return float(sum(each["wait"] for each in trunk) / sum(each["total"] for each in trunk))


def line(places: Sequence[int], values: Sequence[float]) -> dict[str, float] | None:
    """Least squares: what one client more costs, and what is there without any. None for a single place."""
    if len(places) < 2:
        return None
    slope, intercept = statistics.linear_regression(places, values)
    return {"per_client": slope, "intercept": intercept}


def goal(rows: Sequence[Mapping[str, Any]]) -> Figures | None:
    """At most linear: at the largest number a client costs no more than at the reference, whose spread is allowed.

    The limit is the slowest step that counted at the reference. None if a single number was measured.
    """
    largest = rows[-1]
    smaller = [row for row in rows if row["clients"] <= REFERENCE and row is not largest]
    if not smaller:
        return None
    reference = smaller[-1]
    limit, found = reference["seconds_per_client"]["max"], largest["seconds_per_client"]["median"]
    return {
        "reference_clients": reference["clients"],
        "largest_clients": largest["clients"],
        "limit_seconds_per_client": limit,
        "found_seconds_per_client": found,
        "met": found <= limit,
    }
