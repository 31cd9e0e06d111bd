"""Suite `efficiency`: seconds of a sample and ratios from what was measured, with what was published beside. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.bench.published import PUBLISHED
from hpc.bench.suite import Figures
from hpc.bench.turn_figures import counted, member_figures, quiet_rounds, ratios, spread

REFERENCE = "centralised"
TITLES = {
    REFERENCE: "centralised, one process",
    "one_host": "split, two processes on one machine",
    "two_hosts": "split, two hosts, 1100 MB/s",
    "serial_2": "serial, 2 clients",
    **{f"client_batch_{clients}": f"client-batch, {clients} clients" for clients in (2, 4, 8)},
    **{f"replica_{clients}": f"replica-parallel, {clients} clients" for clients in (2, 4, 8)},
}
"""Member → its row, in the table's order."""


def figures(measured: Mapping[str, Any]) -> Figures:
    """A row for each member, the reference's from the first ring; what others' rings had of it is in `references`."""
    samples = measured["setting"]["samples_per_turn"]
    found = {
        name: row
        for number, ring in enumerate(measured["rings"])
        for name, row in _rows(number, ring["members"], samples).items()
        if name != REFERENCE or number == 0
    }
    references = [
        _rows(number, ring["members"], samples)[REFERENCE]["sample_seconds"]
        for number, ring in enumerate(measured["rings"])
    ]
    return {"rows": [found[name] for name in TITLES if name in found], "references": references}


def _rows(ring: int, members: Mapping[str, Any], samples: int) -> dict[str, Figures]:
    rounds = quiet_rounds(members)
    return {name: _row(ring, name, members, rounds, samples) for name in members}


def _row(ring: int, name: str, members: Mapping[str, Any], rounds: list[int], samples: int) -> Figures:
    member = members[name]
    found, steps = member_figures(member, rounds), member["steps_per_turn"]
    seconds, payload = [turn["seconds"] for turn in counted(member, rounds)], found["payload_bytes_per_turn"]
    return {
        "name": name,
        "ring": ring,
        "clients": member["clients"],
        "samples_per_step": samples // steps,
        "sample_seconds": spread([each / samples for each in seconds]),
        "step_seconds": spread([each / steps for each in seconds]),
        "ratio": None if name == REFERENCE else ratios(member, members[REFERENCE], rounds),
        "published": _published(name),
        "payload_bytes_per_step": None if payload is None else payload / steps,
        "trunk_idle_share": found["trunk_idle_share"],
        "peak_rss_mib": found["peak_rss_mib"],
        "step_profile": {
            role: {part: spent / steps for part, spent in parts.items()} for role, parts in found["profile"].items()
        },
    }


def _published(name: str) -> dict[str, Any] | None:
    theirs = PUBLISHED.get(name)
    return None if theirs is None else {"paper": theirs.paper, "sample_seconds": theirs.seconds, "ratio": theirs.ratio}


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """Members that have been published and are not among the rows."""
    there = {row["name"] for row in rows}
    return [name for name in TITLES if name in PUBLISHED and name not in there]
