"""Federations as real processes that live at the same time and take turns (`hpc.turns`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from hpc.bench.suite import Options
from hpc.errors import HpcError
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


class MemberFailed(HpcError):
    """A run of a benchmark ended with an error."""


@dataclass(kw_only=True, frozen=True)
class Member:
    """One federation of a ring, or an uncut model."""

    name: str
    flags: tuple[str, ...]
    steps_per_turn: int = 1


def run_ring(members: Sequence[Member], options: Options, *, turns: int) -> dict[str, dict[str, list[Event]]]:
    """Each member takes `turns` turns; returns member → role → events. Raises `MemberFailed`."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    names = tuple(member.name for member in members)
    folders = {member.name: options.folder / member.name for member in members}
    with TemporaryDirectory(prefix="hpc-keys-") as keys, ExitStack() as stack:
        processes: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(_stop, processes)
        for member in members:
            ring = Ring(
                members=names, me=member.name, turns=turns, steps_per_turn=member.steps_per_turn, port=store.port
            )
            flags = [*_flags(member, options, turns), "--run.output_dir", str(folders[member.name])]
            flags += ["--link.keys_dir", str(Path(keys) / member.name)]
            processes[member.name] = _start(options.local, flags, ring, folders[member.name].with_suffix(".log"))
        _watch(processes, folders, store, names, turns)
    return {name: {role: read_events(path) for role, path in role_files(folders[name]).items()} for name in names}


def _flags(member: Member, options: Options, turns: int) -> list[str]:
    # One step more than the turns have: what precedes it (an average, a hand-over) then ends the last turn as it ends
    # the others, and no process takes its leave while others are measured.
    steps = turns * member.steps_per_turn + 1
    length = ("--train.max_steps", str(steps), "--train.rounds", "0")
    return [*options.flags, *member.flags, *length, *UNDISTURBED, *PATIENCE, *ALONE]


def _start(script: Path, flags: Sequence[str], ring: Ring, log: Path) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(script), *flags],
            env={**os.environ, TURNS: ring.to_json()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _watch(
    processes: dict[str, subprocess.Popen[bytes]],
    folders: dict[str, Path],
    store: Store,
    names: Sequence[str],
    turns: int,
) -> None:
    """Until all have ended, saying how far they are. Every role has deadlines, so this needs none."""
    said = 0
    while any(process.poll() is None for process in processes.values()):
        for name, process in processes.items():
            if process.returncode:
                raise MemberFailed(f"{name} ended with exit code {process.returncode}: {_last_line(folders[name])}")
        if said < turns and store.check([DONE.format((said + 1) * len(names) - 1)]):
            said += 1
            print(f"turn {said} of {turns} ({', '.join(names)})", file=sys.stderr, flush=True)
        time.sleep(POLL_S)
    for name, process in processes.items():
        if process.returncode:
            raise MemberFailed(f"{name} ended with exit code {process.returncode}: {_last_line(folders[name])}")


def _last_line(folder: Path) -> str:
    lines = [line for line in folder.with_suffix(".log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _stop(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Nothing outlives the command; a launcher that is told to end ends its roles."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        alive = [process for process in processes.values() if process.poll() is None]
        for process in alive:
            os.killpg(process.pid, number)
        deadline = time.monotonic() + GRACE_S
        while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
            time.sleep(POLL_S / 10)
