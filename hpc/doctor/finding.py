"""What a check found, and how checks are run: each under a deadline, none able to stop the others."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hpc.config import Config
from hpc.errors import HpcError

Status = Literal["ok", "warn", "fail"]
DEADLINE_S = 20.0  # of each check; a library on a slow network file system loads for long
WIDEST = 400  # characters of another program's words


@dataclass(kw_only=True, frozen=True)
class Asked:
    """What a doctor is asked about."""

    config: Config
    host: str | None = None
    """Another machine that must be reachable from here, at `port`."""
    port: int | None = None


@dataclass(kw_only=True, frozen=True)
class Finding:
    """One check's result."""

    status: Status
    found: str
    cure: str = ""
    """How to mend it; empty where there is nothing to mend."""


Check = Callable[[Asked], Finding]


def ok(found: str) -> Finding:
    return Finding(status="ok", found=found)


def warn(found: str, cure: str) -> Finding:
    """It works, but not well, or not for everything."""
    return Finding(status="warn", found=found, cure=cure)


def fail(found: str, cure: str) -> Finding:
    """A run with this configuration would not work."""
    return Finding(status="fail", found=found, cure=cure)


def examine(
    checks: Mapping[str, Check], asked: Asked, *, alone: Sequence[str] = (), deadline_s: float = DEADLINE_S
) -> dict[str, Finding]:
    """Name → finding, in the order of `checks`. All run at once but those `alone`, which measure and so come last."""
    waiting = {name: _begin(check, asked) for name, check in checks.items() if name not in alone}
    deadline = time.monotonic() + deadline_s
    found = {name: _end(answer, deadline, deadline_s) for name, answer in waiting.items()}
    for name in alone:
        if name in checks:
            found[name] = _end(_begin(checks[name], asked), time.monotonic() + deadline_s, deadline_s)
    return {name: found[name] for name in checks}


def _begin(check: Check, asked: Asked) -> queue.Queue[Finding]:
    """In a thread that nobody waits for beyond the deadline: a file system that hangs can be interrupted by nobody."""
    answer: queue.Queue[Finding] = queue.Queue()
    threading.Thread(target=lambda: answer.put(_safely(check, asked)), daemon=True).start()
    return answer


def _end(answer: queue.Queue[Finding], deadline: float, deadline_s: float) -> Finding:
    try:
        return answer.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        return fail(f"no answer within {deadline_s:g} s", "see whether what it asks hangs: a network file system?")


def _safely(check: Check, asked: Asked) -> Finding:
    try:
        return check(asked)
    except HpcError as error:  # its message says what to change
        return fail(str(error), "")
    except Exception as error:  # a doctor that falls ill helps nobody
        return fail(f"{type(error).__name__}: {first_words(str(error))}", "mend what the message names")


def first_words(text: str) -> str:
    """Another program's words in one line, not endlessly many."""
    return " ".join(text.split())[:WIDEST]


def output_of(
    command: Sequence[str], *, timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command.

    Past the deadline it is killed with all that it started, and the code is 124, as `timeout` has it.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
    except OSError as error:
        return 127, "", str(error)
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return 124, "", f"no answer within {timeout_s:g} s"
    return process.returncode, out, err
