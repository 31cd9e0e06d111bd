"""What else the machine did while something was measured: on a busy machine a time says little. Linux only."""

from __future__ import annotations

import os
import threading
import time
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

SAMPLE_S = 1.0
_BUSY, _STEAL = (0, 1, 2, 5, 6), 7  # columns of /proc/stat's first line: user, nice, system, irq, softirq; steal
_PARENT, _TIMES = 1, slice(11, 15)  # behind the name in /proc/<pid>/stat; own times and those of ended children


class Sample(NamedTuple):
    """`at` as `time.time()` has it; the others are CPU seconds of all cores so far."""

    at: float
    others: float
    stolen: float


class Monitor:
    """A `with` statement; inside it, and after it, `share` says how much of the cores others had."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Monitor:
        self._samples.append(take_sample())
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._samples.append(take_sample())

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self._samples.append(take_sample())

    def share(self, begin: float = 0.0, end: float = float("inf")) -> dict[str, float]:
        """Shares of all cores' time between two moments of `time.time()`: of other processes, and of the host."""
        return shares(self._samples, begin, end)


def shares(samples: list[Sample], begin: float, end: float) -> dict[str, float]:
    """See `Monitor.share`; between two samples the use was even."""
    first, last = _at(samples, max(begin, samples[0].at)), _at(samples, min(end, samples[-1].at))
    time_of_cores = max(last.at - first.at, 1e-9) * (os.cpu_count() or 1)
    return {
        "others": max(0.0, last.others - first.others) / time_of_cores,
        "stolen": max(0.0, last.stolen - first.stolen) / time_of_cores,
    }


def _at(samples: list[Sample], moment: float) -> Sample:
    after = samples[min(bisect_left(samples, moment, key=lambda sample: sample.at), len(samples) - 1)]
    before = samples[max(samples.index(after) - 1, 0)]
    width = after.at - before.at
    part = (moment - before.at) / width if width > 0 else 0.0
    return Sample(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))


def take_sample() -> Sample:
    """Now. Others: whoever is neither this process nor one that it, or its children, started."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy, per_second = sum(ticks[column] for column in _BUSY), os.sysconf("SC_CLK_TCK")
    own = sum(family(_processes(), os.getpid()).values())
    return Sample(time.time(), (busy - own) / per_second, ticks[_STEAL] / per_second)


def _processes() -> dict[int, tuple[int, int]]:
    """Process → its parent, and its ticks with those of its ended children."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        found[int(path.parent.name)] = int(fields[_PARENT]), sum(map(int, fields[_TIMES]))
    return found


def family(processes: Mapping[int, tuple[int, int]], root: int) -> dict[int, int]:
    """`root` and its descendants → their ticks."""
    children: dict[int, list[int]] = {}
    for process, (parent, _) in processes.items():
        children.setdefault(parent, []).append(process)
    found, todo = {}, [root]
    while todo:
        process = todo.pop()
        if process in processes:
            found[process] = processes[process][1]
        todo += children.get(process, [])
    return found
