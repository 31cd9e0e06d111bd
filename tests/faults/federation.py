"""A run of real processes over real sockets, to be broken; nothing of it outlives the test."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc.last_words import LAST_WORDS
from hpc.launcher import THREADS
from hpc.nurslings import Nursery, Nursling
from hpc.report.events import Event, read_events, role_path
from tests.faults.role import ARGUMENTS, DIES_AT
from tests.runs import TINY

POLL_S = 0.02
START_S = 60.0  # until a run's first step, on a busy machine


@dataclass(kw_only=True)
class Federation:
    """Trunk ranks first, then clients; each is forked when it is started."""

    nursery: Nursery
    folder: Path
    keys: Path
    words: Path
    port: int
    flags: list[str]
    trunks: int
    clients: int
    roles: dict[str, Nursling] = field(default_factory=dict)

    def start(self, *names: str, keys: Path | None = None, dies_at: str = "", again: bool = False) -> None:
        """Start these roles, all if none is named. `keys`: other identities than the run's."""
        for name in names or self.names():
            kind, _, number = name.partition("-")
            rank = int(number) + (self.trunks if kind == "client" else 0)
            own = {
                ARGUMENTS: json.dumps([*self.flags, "--link.keys_dir", str(keys or self.keys)]),
                LAST_WORDS: str(self.words),
                THREADS: "1",
                "RANK": str(rank),
                "WORLD_SIZE": str(self.trunks + self.clients),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(self.port),
            }
            if dies_at:
                own[DIES_AT] = dies_at
            self.roles[name + ("+" if again else "")] = self.nursery.start(own)

    def names(self) -> list[str]:
        return [f"trunk-{k}" for k in range(self.trunks)] + [f"client-{k}" for k in range(self.clients)]

    def kill(self, name: str, number: int = signal.SIGKILL) -> float:
        """Send the signal; returns when (Unix time)."""
        self.roles[name].poll()  # takes in what the nursery has told
        pid = self.roles[name].pid
        assert pid is not None, f"{name} was not forked yet"
        at = time.time()
        os.kill(pid, number)
        return at

    def events(self, role: str, name: str) -> list[Event]:
        return [event for event in read_events(role_path(self.folder, role)) if event["event"] == name]

    def steps(self, role: str) -> list[int]:
        return [event["step"] for event in self.events(role, "step")]

    def await_step(self, step: int, role: str = "trunk-0", within_s: float = START_S) -> None:
        self.until(lambda: step in self.steps(role), f"step {step} of {role}", within_s)

    def await_event(self, name: str, within_s: float = 30, **fields: Any) -> Event:
        """The trunk's event of this name and content."""

        def fits(event: Event) -> bool:
            return all(event[key] == value for key, value in fields.items())

        self.until(lambda: any(map(fits, self.events("trunk-0", name))), f"{name} {fields}", within_s)
        return next(event for event in self.events("trunk-0", name) if fits(event))

    def end(self, *names: str, within_s: float = 60) -> dict[str, int]:
        """The exit codes of these roles (all), which must end in time."""
        awaited = {name: self.roles[name] for name in names or self.roles}
        self.until(lambda: all(role.poll() is not None for role in awaited.values()), f"the end of {names}", within_s)
        return {name: role.returncode or 0 for name, role in awaited.items()}

    def said(self, role: str) -> str:
        """The role's last words, without its name and code; empty if it had none."""
        path = self.words / f"{role}.txt"
        return path.read_text().partition("\n")[2].partition(": ")[2] if path.exists() else ""

    def until(self, done: Callable[[], bool], what: str, within_s: float) -> None:
        deadline = time.monotonic() + within_s
        while not done():
            if time.monotonic() > deadline:
                ended = {name: (role.returncode, self.said(name)) for name, role in self.roles.items()}
                raise AssertionError(f"no {what} within {within_s} s; ended: {ended}")
            time.sleep(POLL_S)

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


@contextmanager
def federation(
    nursery: Nursery, folder: Path, keys: Path, *flags: str, clients: int = 3, trunks: int = 1, timeout_s: float = 20
) -> Iterator[Federation]:
    """A run of the tiny model, not yet started."""
    words = folder / "words"
    words.mkdir(parents=True)
    run = folder / "run"
    common = [*TINY, "--train.clients", str(clients), "--trunk.ranks", str(trunks), "--data.val_examples", "0"]
    common += ["--link.timeout_s", str(timeout_s), "--run.output_dir", str(run), "--run.report_to", "[]", *flags]
    made = Federation(
        nursery=nursery,
        folder=run,
        keys=keys,
        words=words,
        port=free_port(),
        flags=common,
        trunks=trunks,
        clients=clients,
    )
    try:
        yield made
    finally:
        for role in made.roles.values():
            if role.poll() is None and role.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(role.pid, signal.SIGKILL)
        made.end(within_s=10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
