"""What the processes of a run tell whoever started them: why each ends, through files of a private folder.

So the user sees one line, the cause, instead of every role's echo of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from hpc import supervision
from hpc.errors import BadInput, HpcError, Paused

LAST_WORDS = "HPC_LAST_WORDS"
_ENDED_WELL = "ended"


class RoleFailed(HpcError):
    """A role ended with an error; carries its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def leave_last_words(role: str, text: str, code: int) -> bool:
    """Tell the launcher why this role ends; False if nobody listens and the role must print it itself."""
    folder = os.environ.get(LAST_WORDS)
    if folder is None or not Path(folder).is_dir():
        return False
    draft = Path(folder) / f".{role}.draft"
    draft.write_text(f"{code}\n{role}: {text}", encoding="utf-8")
    draft.rename(Path(folder) / f"{role}.txt")
    return True


def leave_log_path(role: str, path: Path) -> None:
    """Tell the launcher where this role's log is: who is killed cannot write its last line."""
    folder = os.environ.get(LAST_WORDS)
    if folder is not None and Path(folder).is_dir():
        Path(folder, f"{role}.log").write_text(str(path.absolute()), encoding="utf-8")


def killed_roles(statuses: Mapping[str, int], words: Path) -> Iterator[tuple[str, str, Path]]:
    """Role, signal and log file of those who were killed after their log had begun; `statuses` as in `cause`."""
    for role, status in statuses.items():
        path = words / f"{role}.log"
        if status < 0 and path.exists():
            yield role, signal.Signals(-status).name, Path(path.read_text(encoding="utf-8"))


def leave_ending(line: str) -> None:
    """The last line of a run that ended well: the launcher's to print when all roles have ended, or this role's."""
    folder = os.environ.get(LAST_WORDS)
    if folder is not None and Path(folder).is_dir():
        Path(folder, _ENDED_WELL).write_text(line, encoding="utf-8")
    else:
        print(line, flush=True)


def ending(words: Path) -> str | None:
    """What `leave_ending` left."""
    path = words / _ENDED_WELL
    return path.read_text(encoding="utf-8") if path.exists() else None


def last_words(words: Path, roles: Collection[str] | None = None) -> list[RoleFailed]:
    """What roles that failed (of `roles`; None: any) have left, the first to fail first."""
    found = []
    for path in sorted(words.glob("*.txt"), key=lambda path: path.stat().st_mtime_ns):
        if roles is not None and path.stem not in roles:
            continue
        code, _, text = path.read_text(encoding="utf-8").partition("\n")
        found.append(RoleFailed(text, int(code)))
    return found


def cause(failed: Mapping[str, int], words: Path) -> RoleFailed:
    """Why a run ended; `failed`: role → exit status, below 0 the signal that killed it (as `subprocess` has it).

    Bad input is the cause of anything else. Who was killed has no last words, and the others only miss it. Then the
    trunk, which knows more than a client that only lost it; then whoever failed first.
    """
    killed = "; ".join(
        f"killed by {signal.Signals(-status).name} ({role})" for role, status in failed.items() if status < 0
    )
    # A client that the run could do without may have left words long ago. mpirun stands for all roles.
    said = last_words(words, None if "mpirun" in failed else failed)
    if said:
        first = RoleFailed(*supervision.cause([(str(each), each.exit_code) for each in said]))
        spoilt = killed and first.exit_code not in (BadInput.exit_code, Paused.exit_code)
        return RoleFailed(f"{killed}; {first}", 1) if spoilt else first
    if killed:
        return RoleFailed(killed, 1)
    role, status = next(iter(failed.items()))
    return RoleFailed(f"{role} ended with exit code {status} without a word; see above for what it printed", 1)
