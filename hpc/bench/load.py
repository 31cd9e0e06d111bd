"""What else the machine did while something was measured: a benchmark on a busy machine says little."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from types import TracebackType
from typing import Any

_BUSY, _STEAL = (0, 1, 2, 5, 6), 7  # columns of /proc/stat's first line: user, nice, system, irq, softirq; steal


class Watch:
    """A `with` statement; afterwards `figures` says how much of the machine others used."""

    def __enter__(self) -> Watch:
        self._load, self._from = os.getloadavg()[0], _now()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._until = _now()

    def figures(self) -> dict[str, Any]:
        """`load_before`: of the last minute; shares are of all cores' time; None where the system does not tell."""
        wall, busy, steal, own = (
            None if a is None or b is None else b - a for a, b in zip(self._from, self._until, strict=True)
        )
        assert wall is not None
        assert own is not None
        cores = (os.cpu_count() or 1) * wall
        return {
            "load_before": round(self._load, 2),
            "own_share": own / cores,
            "others_share": None if busy is None else max(0.0, busy - own) / cores,
            "stolen_share": None if steal is None else steal / cores,
        }


def _now() -> tuple[float | None, ...]:
    """Wall seconds; CPU seconds of the machine, stolen from it, and of this process and its ended children."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(each.ru_utime + each.ru_stime for each in own)
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return time.monotonic(), None, None, seconds
    per_second = os.sysconf("SC_CLK_TCK")
    return time.monotonic(), sum(ticks[i] for i in _BUSY) / per_second, ticks[_STEAL] / per_second, seconds
