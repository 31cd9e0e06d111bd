"""Federations as real processes that live at the same time and take turns (`hpc.turns`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hpc.bench.namespaces import Hosts
from hpc.bench.suite import Options
from hpc.errors import HpcError
from hpc.launcher import child_environment
from hpc.link.identity import ensure_local
from hpc.report.events import Event, read_events, role_files
from hpc.turns import DONE, TURNS, Ring

if TYPE_CHECKING:
    from torch.distributed import Store

POLL_S = 0.5
GRACE_S = 20.0  # for a launcher to end its roles
# All members start at once, and the first turn of the first waits for the last of the others.
PATIENCE = ("--link.timeout_s", "900")
UNDISTURBED = ("--data.val_examples", "0", "--run.baseline_steps", "0", "--train.save_every", "0")
ALONE = ("--link.transport", "gloo", "--run.report_to", "[]")
PORT = "29500"  # of a federation on two hosts, which are nobody else's


class MemberFailed(HpcError):
    """A run of a benchmark ended with an error."""


@dataclass(kw_only=True, frozen=True)
class Member:
    """One federation of a ring, or an uncut model."""

    name: str
    flags: tuple[str, ...]
    steps_per_turn: int = 1
    hosts: Hosts | None = None
    """Its trunk and its one client run on these, with lines to this machine, where the turns are kept."""


@dataclass(kw_only=True, frozen=True)
class Started:
    """A process of a member, and the file that has what it says."""

    process: subprocess.Popen[bytes]
    log: Path


def run_ring(members: Sequence[Member], options: Options, *, turns: int) -> dict[str, dict[str, list[Event]]]:
    """Each member takes `turns` turns; returns member → role → events. Raises `MemberFailed`."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    names = tuple(member.name for member in members)
    folders = {member.name: options.folder / member.name for member in members}
    with TemporaryDirectory(prefix="hpc-keys-") as keys, ExitStack() as stack:
        started: dict[str, Started] = {}
        stack.callback(_stop, started)
        for member in members:
            ring = Ring(
                members=names, me=member.name, turns=turns, steps_per_turn=member.steps_per_turn, port=store.port
            )
            flags = [*_flags(member, options, turns), "--run.output_dir", str(folders[member.name])]
            flags += ["--link.keys_dir", str(Path(keys) / member.name)]
            if member.hosts is None:
                command = [sys.executable, str(options.local), *flags]
                log = folders[member.name].with_suffix(".log")
                started[member.name] = _start(command, {TURNS: ring.to_json()}, log)
            else:
                ensure_local(Path(keys) / member.name, 1)
                started |= _start_apart(member.name, member.hosts, ring, options, flags)
        _watch(started, store, names, turns)
    return {name: {role: read_events(path) for role, path in role_files(folders[name]).items()} for name in names}


def _start_apart(name: str, hosts: Hosts, ring: Ring, options: Options, flags: Sequence[str]) -> dict[str, Started]:
    """The trunk on host a, the client on host b; they share this machine's files."""
    script, variables = options.local.with_name("train.py"), {TURNS: replace(ring, host=hosts.here).to_json()}
    variables |= {"WORLD_SIZE": "2", "MASTER_ADDR": "host-a", "MASTER_PORT": PORT}
    found = {}
    for rank, host in enumerate("ab"):
        own = (*flags, "--link.interface", hosts.device())
        command = hosts.command(host, sys.executable, str(script), *own)
        log = options.folder / f"{name}-host-{host}.log"
        found[f"{name} on host {host}"] = _start(command, {**variables, "RANK": str(rank)}, log)
    return found


def _flags(member: Member, options: Options, turns: int) -> list[str]:
    # One step more than the turns have: what precedes it (an average, a hand-over) then ends the last turn as it ends
    # the others, and no process takes its leave while others are measured.
    steps = turns * member.steps_per_turn + 1
    length = ("--train.max_steps", str(steps), "--train.rounds", "0")
    return [*options.flags, *member.flags, *length, *UNDISTURBED, *PATIENCE, *ALONE]


def _start(command: Sequence[str], variables: Mapping[str, str], log: Path) -> Started:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**child_environment(os.environ), **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Started(process=process, log=log)


def _watch(started: Mapping[str, Started], store: Store, names: Sequence[str], turns: int) -> None:
    """Until all have ended, saying how far they are. Every role has deadlines, so this needs none."""
    said, first = 0, 0.0
    while any(each.process.poll() is None for each in started.values()):
        _raise_if_failed(started)
        if said < turns and store.check([DONE.format((said + 1) * len(names) - 1)]):
            said, now = said + 1, time.monotonic()
            first = first or now
            left = f", about {(now - first) / (said - 1) * (turns - said):.0f} s left" if said > 1 else ""
            print(f"turn {said} of {turns} ({', '.join(names)}){left}", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    _raise_if_failed(started)


def _raise_if_failed(started: Mapping[str, Started]) -> None:
    for name, each in started.items():
        if each.process.returncode:
            raise MemberFailed(f"{name} ended with exit code {each.process.returncode}: {_last_line(each.log)}")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _stop(started: Mapping[str, Started]) -> None:
    """Nothing outlives the command; a launcher that is told to end ends its roles."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = [each.process for each in started.values() if each.process.poll() is None]
        for process in alive:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
