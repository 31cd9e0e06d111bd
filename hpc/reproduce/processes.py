"""The processes of runs: started from several threads, and none left when the command ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# How a run is told to end: to write a checkpoint first (which may take it `run.grace_s`), at once, without a word.
ENDING = ((signal.SIGTERM, 70.0), (signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))


class Processes:
    """None is started once `end` was called."""

    def __init__(self) -> None:
        self.ended = False
        self._guard = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []

    def run(self, command: Sequence[str], log: Path, *, hand_down: int) -> int | None:
        """The exit code, or none if the end came first. `hand_down`: an open file that the process shall hold, too."""
        with log.open("wb") as output, self._guard:
            if self.ended:
                return None
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(hand_down,),
            )
            self._started.append(process)
        return process.wait()

    def end(self, say: Callable[[str], None]) -> None:
        """A launcher that is told to end ends its roles. An interrupt meanwhile hurries it."""
        with self._guard:
            self.ended = True
        alive = [process for process in self._started if process.poll() is None]
        if alive:
            say(f"ending what is under way ({len(alive)}); it goes on from its checkpoint next time")
        for number, patience_s in ENDING:
            with contextlib.suppress(KeyboardInterrupt):
                _end([process for process in alive if process.poll() is None], number, patience_s)


def _end(alive: Sequence[subprocess.Popen[bytes]], number: signal.Signals, patience_s: float) -> None:
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
    deadline = time.monotonic() + patience_s
    while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
        time.sleep(0.1)
