"""Slurm's short forms: `gpu[03-05,9],login` for hosts, `2(x3),1` for one number a host. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hpc.errors import TopologyError

_ENTRY = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PIECE = re.compile(r"([^\[\]]*)\[([^\[\]]*)\]|([^\[\]]+)")


def host_names(hostlist: str) -> list[str]:
    """Every host of a Slurm node list, in its order: as `scontrol show hostnames` prints them.

    Raises `TopologyError` for brackets that do not hold numbers or ranges of them.
    """
    return [name for entry in _ENTRY.findall(hostlist) for name in _expand(entry, hostlist)]


def first_host(hostlist: str) -> str:
    """First host of a Slurm node list: `gpu[03-05,9],login` → `gpu03`."""
    return next(iter(host_names(hostlist)), hostlist)


def _expand(entry: str, hostlist: str) -> list[str]:
    names = [""]
    for before, ranges, plain in _PIECE.findall(entry):
        endings = [before + number for number in _numbers(ranges, hostlist)] if not plain else [plain]
        names = [name + ending for name in names for ending in endings]
    return names


def _numbers(ranges: str, hostlist: str) -> Iterator[str]:
    """`03-05,9` → 03, 04, 05, 9: leading zeros are kept."""
    for each in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        if match is None:
            raise TopologyError(f"the node list {hostlist!r} has [{ranges}], which is no list of numbers")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))


def repeated(counts: str) -> list[int]:
    """One number for each host: `2(x3),1` → 2, 2, 2, 1. Raises `TopologyError` for anything else."""
    found: list[int] = []
    for each in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each)
        if match is None:
            raise TopologyError(f"{counts!r} is no list of counts as Slurm writes them, such as 2(x3),1")
        found += [int(match[1])] * int(match[2] or 1)
    return found
