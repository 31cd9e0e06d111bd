"""What the end of one process means for a run of several: the rules, without the processes. Pure.

Whoever started the roles (`hpc.launcher` on one machine, `hpc.slurm_job` in a job) asks here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

Member = TypeVar("Member")
BAD_INPUT, PAUSED = 2, 75
SIGNALLED = 128  # a shell's, and srun's, exit code for who was killed is this and the signal's number
NEAR_THE_LIMIT_S = 300.0


def fatal(codes: Mapping[Member, int | None], spared: Collection[Member], least: int) -> list[Member]:
    """Those whose failure ends the run, of all with their exit codes (none: it still runs).

    Of the `spared`, some may fail as long as `least` are left.
    """
    failed = [member for member, code in codes.items() if code]
    left = sum(member not in failed for member in spared)
    return [member for member in failed if member not in spared or left < least]


def served(codes: Mapping[Member, int | None], spared: Collection[Member]) -> bool:
    """Whether all that the run cannot do without have ended."""
    return all(code is not None for member, code in codes.items() if member not in spared)


def cause(ended: Sequence[tuple[str, int]]) -> tuple[str, int]:
    """The one of the failed roles (in the order in which they ended, with their exit codes) that is to blame.

    Bad input is the cause of anything else. Whom a signal killed, the others only miss. Then the trunk, which knows
    more than a client that only lost it (the rule of `hpc.last_words`).
    """
    return min(ended, key=lambda each: (each[1] != BAD_INPUT, not killed(each[1]), not each[0].startswith("trunk")))


def killed(code: int) -> bool:
    """Whether an exit code, of a process or of srun, says that a signal ended it."""
    return code < 0 or code > SIGNALLED


def may_return(code: int | None, restarts: int, allowed: int) -> bool:
    """Whether a client that ended with `code` is started again; what it was told wrong, it would be told again."""
    return code not in (None, 0, BAD_INPUT, PAUSED) and restarts < allowed


def worth_requeueing(progressed: bool, seconds_left: float) -> bool:
    """Whether another attempt may get further than this one, which was warned with so much of its time left.

    One that the time limit stopped before its first checkpoint would be stopped there again, for ever.
    """
    return progressed or seconds_left > NEAR_THE_LIMIT_S
