"""The processes of a run on one machine: watched, started again where they may be, and ended together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from hpc import supervision
from hpc.config import Config
from hpc.errors import Paused
from hpc.last_words import RoleFailed, cause, last_words
from hpc.logs import note_killed
from hpc.nurslings import Process

GRACE_S = 15.0  # for the others to notice a dead role and end by themselves
POLL_S = 0.05


class Roles:
    """Role → its process. With MPI, `mpirun` stands for all of them."""

    def __init__(self, config: Config, words: Path) -> None:
        """`words`: the folder of the roles' last words."""
        self._config, self._words = config, words
        self._processes: dict[str, Process] = {}
        self._begin: dict[str, Callable[[], Process]] = {}
        self._restarts: Counter[str] = Counter()
        self._asked = False

    def start(self, name: str, begin: Callable[[], Process]) -> None:
        """`begin` starts the process, and may be called again."""
        self._begin[name] = begin
        self._processes[name] = begin()

    def pause(self, number: int, frame: object) -> None:
        """A signal handler: what a job scheduler asks for is a checkpoint and the end; asked again, the end at once."""
        trunk = [
            name for name in self._processes if name.startswith("trunk") or name == "mpirun"
        ]  # mpirun passes it on
        pids = [self._processes[name].pid for name in trunk if self._processes[name].poll() is None]
        if self._asked or not any(pids):
            raise RoleFailed(f"ended by {signal.Signals(number).name}", 128 + number)
        self._asked = True
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid or 0, signal.SIGUSR1)

    def watch(self) -> None:
        """Until all have ended well, or one has failed and the others have had their time to end.

        Raises `RoleFailed` with the cause, `Paused` if the run was asked to.
        """
        deadline = None
        while any(code is None for code in self._codes().values()):
            codes = self._codes()
            if deadline is None and (self._fatal() or supervision.served(codes, self._spared)):
                deadline = time.monotonic() + GRACE_S
            if deadline is None:
                self._bring_back()
            elif time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        self._conclude()

    def _conclude(self) -> None:
        codes = {name: code or 0 for name, code in self._codes().items()}
        note_killed(codes, self._words)
        failed = self._fatal()
        if self._asked and any(codes[name] == -signal.SIGUSR1 for name in failed):
            raise Paused("ended before the run began; start it again")
        if failed:
            why = cause({name: codes[name] for name in failed}, self._words)
            raise Paused(str(why)) if why.exit_code == Paused.exit_code else why
        for left in last_words(self._words):
            print(f"without harm to the run: {left}", file=sys.stderr)

    def _codes(self) -> dict[str, int | None]:
        return {name: process.poll() for name, process in self._processes.items()}

    @property
    def _spared(self) -> list[str]:
        """Roles that the run may be able to do without. An MPI job ends with any of its processes."""
        least = self._config.train.min_clients
        return [name for name in self._processes if least and name.startswith("client")]

    def _fatal(self) -> list[str]:
        return supervision.fatal(self._codes(), self._spared, self._config.train.min_clients)

    def _bring_back(self) -> None:
        """Start clients that died again, as often as `run.client_restarts` allows."""
        allowed = self._config.run.client_restarts
        for name, code in self._codes().items():
            if name in self._spared and supervision.may_return(code, self._restarts[name], allowed):
                self._restarts[name] += 1
                note_killed({name: code or 0}, self._words)
                told = f"{name} has ended; it is started again ({self._restarts[name]} of {allowed})"
                print(told, file=sys.stderr, flush=True)
                self._processes[name] = self._begin[name]()

    def stop(self) -> None:
        """No role outlives the command."""
        stop(list(self._processes.values()))


def stop(processes: list[Process] | list[subprocess.Popen[bytes]]) -> None:
    """End, then kill, each with its whole process group. SIGTERM would only pause a role."""
    for number in (signal.SIGHUP, signal.SIGKILL):
        # One that is yet to be forked ends with the nursery.
        alive = {process.pid: process for process in processes if process.poll() is None and process.pid is not None}
        for pid in alive:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        deadline = time.monotonic() + 3
        while any(process.poll() is None for process in alive.values()) and time.monotonic() < deadline:
            time.sleep(POLL_S)
