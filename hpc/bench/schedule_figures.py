"""Suite `schedules`: medians, ratios and goals from what was measured. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from hpc.bench.turn_figures import member_figures, quiet_rounds, ratios, spread

REFERENCE = "centralised"
# Schedule → at most so many times as long as the uncut model on the same batches.
LIMITS = {"pipelined": 1.10, "pipelined_2_ranks": 1.10, "client_batch": 1.15, "serial": 1.20}
REPLICA_LIMIT = 1.25  # times client_batch
SPEED_UP = 2.0  # of one pass over eight
MEMORY_LIMIT = 1.15  # of eight clients over one

Measured = Mapping[str, Any]


def figures(measured: Measured) -> dict[str, Any]:
    """`schedules` has a row for each member of each ring."""
    passes, memory = measured["replica_pass"], measured["replica_memory"]["trunk_peak_rss_mib"]
    seconds = {name: found[passes["warm_up"] :] for name, found in passes["seconds"].items()}
    many, one = memory.values()
    found = {
        "schedules": [row for number, ring in enumerate(measured["rings"]) for row in _rows(number, ring["members"])],
        "replica_over_client_batch": _over(measured, "replica", "client_batch"),
        "serial_over_sequential": _over(measured, "serial", "centralised_sequential"),
        "replica_pass": {
            **{name: spread(values) for name, values in seconds.items()},
            "speed_up": statistics.median(seconds["one_by_one"]) / statistics.median(seconds["together"]),
        },
        "replica_memory": {"trunk_peak_rss_mib": dict(memory), "ratio": many / one},
    }
    return {**found, "goals": list(_goals(found))}


def _rows(ring: int, members: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    reference, rounds = members[REFERENCE], quiet_rounds(members)
    for name, member in members.items():
        ratio = None if name == REFERENCE else ratios(member, reference, rounds)
        yield {"ring": ring, "schedule": name, "ratio": ratio, **member_figures(member, rounds)}


def _over(measured: Measured, name: str, other: str) -> dict[str, float] | None:
    """Turn by turn where both are in one ring."""
    for ring in measured["rings"]:
        members = ring["members"]
        if {name, other} <= members.keys():
            return ratios(members[name], members[other], quiet_rounds(members))
    return None


def _goals(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for row in found["schedules"]:
        if row["schedule"] in LIMITS:
            what = f"{row['schedule']}: time of a turn, times {REFERENCE}'s"
            yield _goal(what, row["ratio"]["median"], at_most=LIMITS[row["schedule"]])
    if found["serial_over_sequential"]:
        what = "serial: time of a turn, times that of the uncut model on the same batches, one client after another"
        yield _goal(what, found["serial_over_sequential"]["median"], at_most=LIMITS["serial"])
    if found["replica_over_client_batch"]:
        what = "replica: time of a turn, times client_batch's"
        yield _goal(what, found["replica_over_client_batch"]["median"], at_most=REPLICA_LIMIT)
    what = "replica: speed of one pass for all clients, times that of a pass for each"
    yield _goal(what, found["replica_pass"]["speed_up"], at_least=SPEED_UP)
    many, one = found["replica_memory"]["trunk_peak_rss_mib"]
    what = f"replica: trunk's peak memory, {many}, times that of {one}"
    yield _goal(what, found["replica_memory"]["ratio"], at_most=MEMORY_LIMIT)


def _goal(what: str, value: float, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
    return {"what": what, "found": value, "at_most": at_most, "at_least": at_least, "met": met}
