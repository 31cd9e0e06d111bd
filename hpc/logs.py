"""What a role says while it works: one line form, in a file of the role's own and, much less of it, on the terminal.

    2026-11-23 19:50:12.345 INFO client-0 linked to server over gloo, aes-256-gcm

Date and time are this host's, in its own zone (the first line names it). Hosts' clocks may be apart, so nothing else
is worked out from them. Never in here: text, keys, or another role's loss.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from hpc.errors import BadInput, DataError, HpcError, Paused
from hpc.last_words import RoleFailed, killed_roles, leave_log_path

ENDING = "run ended: "
TALKERS = ("trunk-0", "centralised")  # whose INFO lines are also worth a place where all roles' output is mixed
KEPT_LINES = 1000  # before the file is there

log = logging.getLogger("hpc")
_ending = logging.getLogger("hpc.ending")  # the terminal is told of an end in another way


class LineForm(logging.Formatter):
    """Date, time, level, role, then the message; each of its lines by itself, so that nothing can pose as a line."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        seconds, thousandths = divmod(int(record.created * 1000), 1000)
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seconds))}.{thousandths:03d}"
        lines = super().format(record).splitlines() or [""]
        return "\n".join(f"{stamp} {record.levelname} {self.role} {_printable(line)}" for line in lines)


def _printable(line: str) -> str:
    """A peer's words may be in it: no control sequence of theirs reaches a terminal."""
    return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class RoleFile(logging.Handler):
    """`<run folder>/logs/<role>.log`, flushed at every line; what is said before `begin` waits for it.

    A run that is refused never begins and leaves no file. A file that cannot be written costs the log, not the run.
    """

    def __init__(self, role: str) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(LineForm(role))
        self._role, self._path, self._waiting, self._warned = role, None, list[str](), False
        self._descriptor: int | None = None

    _path: Path | None

    def begin(self, folder: str | Path) -> None:
        self._path = Path(folder) / "logs" / f"{self._role}.log"
        self._write("".join(self._waiting))
        self._waiting.clear()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{self.format(record)}\n"
        if self._path is not None:
            self._write(line)
        elif len(self._waiting) < KEPT_LINES:
            self._waiting.append(line)

    def _write(self, text: str) -> None:
        assert self._path is not None
        try:
            if self._descriptor is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._descriptor, text.encode(errors="backslashreplace"))
        except OSError as error:
            if not self._warned:
                self._warned = True  # first, as the warning comes back here
                log.warning("log lines of %s are lost: %s cannot be written (%s)", self._role, self._path, error)

    def close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None
        super().close()


class Terminal(logging.Handler):
    """Standard error as it is at the time; one that is gone (a closed session) costs nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{self.format(record)}\n")
            sys.stderr.flush()


class RoleLog:
    """The log of this process's role: where its lines go."""

    def __init__(self, role: str, *, mixed: bool) -> None:
        """`mixed`: the terminal, or the file in its place, is shared by roles that nobody sorts (srun, mpirun)."""
        self.role, self.mixed, self.file = role, mixed, RoleFile(role)
        self.terminal = Terminal(logging.INFO if mixed and role in TALKERS else logging.WARNING)
        self.terminal.setFormatter(LineForm(role) if mixed else logging.Formatter(f"%(levelname)s {role}: %(message)s"))
        self.terminal.addFilter(lambda record: record.name != _ending.name)

    def line(self, text: str, level: int = logging.INFO) -> str:
        """`text` as it stands on the terminal without being logged."""
        record = logging.LogRecord(log.name, level, "", 0, text, None, None)
        return LineForm(self.role).format(record) if self.mixed else text


_now: RoleLog | None = None


def set_up(role: str, *, mixed: bool) -> None:
    """Send this process's log lines to the terminal and, once the run writes anything, to the role's file."""
    global _now
    root = logging.getLogger()
    if _now is not None:  # a process that was forked, or takes up another role
        for handler in (_now.file, _now.terminal):
            root.removeHandler(handler)
            handler.close()
    _now = RoleLog(role, mixed=mixed)
    log.setLevel(logging.INFO)
    root.addHandler(_now.file)
    root.addHandler(_now.terminal)


def begin_file(folder: str | Path) -> None:
    """The run writes from now on: so does the log, to `folder`/logs/<role>.log."""
    if _now is not None:
        _now.file.begin(folder)
        leave_log_path(_now.role, Path(folder) / "logs" / f"{_now.role}.log")


def terminal_line(text: str) -> str:
    """`text` as this role may print it: with date, time and role where several roles' output is mixed."""
    return text if _now is None else _now.line(text)


def ended_well(why: str) -> None:
    """The last line of this role's file."""
    _ending.info("%s%s", ENDING, why)


def ended_badly(error: BaseException) -> None:
    """The last line of this role's file, without what might quote data."""
    _ending.log(_level(error), "%s%s", ENDING, reason(error, private=True))


def note_killed(statuses: Mapping[str, int], words: Path) -> None:
    """Write the last line of those who were killed, for them. Arguments as those of `hpc.last_words.killed_roles`."""
    for role, name, path in killed_roles(statuses, words):
        record = logging.LogRecord(log.name, logging.ERROR, "", 0, f"{ENDING}killed by {name}", None, None)
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(f"{LineForm(role).format(record)}\n")


def print_ending(role: str, error: BaseException) -> None:
    """The last line on the terminal, for a role that has no launcher to say it: bad input as one plain line."""
    if isinstance(error, BadInput):
        line = f"{role}: error: {error}"
    elif _now is not None and _now.mixed:
        line = _now.line(f"{ENDING}{reason(error)}", _level(error))
    else:
        line = f"{ENDING}{role}: {reason(error)}"
    sys.stderr.write(f"{line}\n")


def _level(error: BaseException) -> int:
    return logging.INFO if isinstance(error, Paused) else logging.ERROR


def reason(error: BaseException, *, private: bool = False) -> str:
    """Why a role ended, in one line. `private`: leave out messages that may quote data."""
    kind = type(error).__name__
    if private and isinstance(error, DataError):
        return "bad data; this role's terminal output says which"
    if isinstance(error, (BadInput, Paused, RoleFailed)):
        return str(error)
    if isinstance(error, HpcError):
        return f"{kind}: {error}"
    at = traceback.extract_tb(error.__traceback__)[-1:]
    where = "".join(f" in {Path(frame.filename).name} line {frame.lineno}" for frame in at)
    said = "" if private else "".join(f": {line}" for line in str(error).splitlines()[:1])
    return f"{kind}{said}{where} (not foreseen: the traceback is in the terminal output)"
