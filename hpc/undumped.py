"""A process that holds keys leaves no image of its memory behind.

Two switches of Linux. RLIMIT_CORE 0: no core file, in this process and in all that it starts. PR_SET_DUMPABLE 0: no
core to a collector either, and nobody but root may read its memory or attach to it; a new program sets it anew. The
second stays off where ranks must read each other's memory: MPI over shared memory, and GPUs of one host.

What neither does: keep pages from being swapped out, or root out.
"""

from __future__ import annotations

import ctypes
import resource

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def leave_no_core() -> None:
    """No core files from now on. Lowers the hard limit too: what this process starts cannot raise it again."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def hide_memory(*, shares_memory: bool) -> bool:
    """`leave_no_core`, and unless it `shares_memory` with other ranks, hidden from all but root. Returns whether."""
    leave_no_core()
    if shares_memory:
        return False
    try:
        return ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) == 0
    except (OSError, AttributeError):  # not Linux
        return False
