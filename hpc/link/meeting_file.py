"""How roles meet through a folder that all of them share, where they cannot reach a TCP store.

Trunk rank 0 makes a store of its own, `meet-<name>-<random>/store`, and puts the name of that into the pointer
`meet-<name>`, whose time of change it renews as long as it lives. A pointer that an ended or killed run left behind
does not change, so nobody takes it up: no clock is compared, only seen to move. Everything is its owner's alone.

No torch here until the store is opened, since the folder is checked before any work.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from hpc.errors import ConfigError, PeerLost, TopologyError

if TYPE_CHECKING:
    import torch.distributed as dist

BEAT_S = 0.25
SILENT_S = 2.0  # a pointer that has not moved for so long is nobody's; a trunk rank 0 waits so long if it finds one
_LOOK_S = 0.05
_hosted: list[Meeting] = []


def meeting_name(port: int, run_name: str, environ: Mapping[str, str]) -> str:
    """What the roles of one run, and of no other in the folder, know: the port given, the Slurm job, or the run's name.

    A requeued job keeps its number, and meets anew under the same name.
    """
    job = environ.get("SLURM_HET_JOB_ID") or environ.get("SLURM_JOB_ID")
    if port:
        return f"port-{port}"
    return f"job-{job}" if job else re.sub(r"[^\w.+-]", "_", run_name) or "run"


def require_folder(folder: str) -> None:
    """Raises ConfigError unless the folder is there and files in it can be written, locked and renamed."""
    if not Path(folder).is_dir():
        raise ConfigError(f"--link.rendezvous {folder} is not a folder; make it where all roles see it (mkdir -p)")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".meet-") as probe:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            probe.write(b"written")
            probe.flush()
    except OSError as error:
        raise ConfigError(
            f"--link.rendezvous {folder}: files there cannot be written and locked ({error.strerror}); "
            "choose a shared folder in which they can"
        ) from None


class Meeting:
    """Trunk rank 0's side: the store, and the pointer to it, until `close`."""

    def __init__(self, folder: str, name: str) -> None:
        self._pointer = Path(folder) / f"meet-{name}"
        self._own = Path(folder) / f"meet-{name}-{secrets.token_hex(8)}"
        _replace_stale(self._pointer)
        self._own.mkdir(mode=0o700)
        draft = self._own / "pointer"
        for path, text in ((self._own / "store", ""), (draft, self._own.name)):
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
                file.write(text)
        try:
            os.link(draft, self._pointer)  # unlike a renaming, refused where there is one
        except FileExistsError:
            shutil.rmtree(self._own)
            raise _taken(self._pointer) from None
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name="meeting", daemon=True).start()
        _hosted.append(self)
        atexit.register(leave_meetings)

    @property
    def path(self) -> Path:
        return self._own / "store"

    def close(self) -> None:
        self._ended.set()
        if _pointed_at(self._pointer) == self._own.name:
            self._pointer.unlink(missing_ok=True)
        shutil.rmtree(self._own, ignore_errors=True)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            with suppress(OSError):  # a disk that fails for a moment must not end the run
                if _pointed_at(self._pointer) == self._own.name:
                    os.utime(self._pointer)


def open_store(folder: str, name: str, *, hosts: bool, timeout_s: float) -> dist.Store:
    """The run's store in `folder`; trunk rank 0 `hosts` it.

    Raises TopologyError if another run meets there under that name, PeerLost if nobody does for `timeout_s` seconds.
    """
    import torch.distributed as dist

    path = Meeting(folder, name).path if hosts else _find(Path(folder), name, timeout_s)
    store = dist.FileStore(str(path), -1)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def leave_meetings() -> None:
    """Remove what this process has put into shared folders. May be called again."""
    while _hosted:
        _hosted.pop().close()


def _find(folder: Path, name: str, timeout_s: float) -> Path:
    pointer, deadline = folder / f"meet-{name}", time.monotonic() + timeout_s
    first_seen = _state(pointer)
    while time.monotonic() < deadline:
        seen, own = _state(pointer), _pointed_at(pointer)
        # One that came or moved while this role looked belongs to a run that lives.
        if own is not None and seen is not None and seen != first_seen:
            return folder / own / "store"
        time.sleep(_LOOK_S)
    others = sorted(each.name.removeprefix("meet-") for each in folder.glob("meet-*") if each.is_file())
    there = f"; there are {', '.join(others)}" if others else ""
    raise PeerLost(
        f"no run meets in {folder} as {name!r} after {timeout_s:g} s{there}: is trunk rank 0 running, and was it given "
        "the same --link.rendezvous and --link.port?"
    )


def _replace_stale(pointer: Path) -> None:
    """Clear away what a killed run left. Raises TopologyError if that run is alive."""
    before, own = _state(pointer), _pointed_at(pointer)
    if before is None:
        return
    deadline = time.monotonic() + SILENT_S
    while time.monotonic() < deadline:
        if _state(pointer) not in (before, None):
            raise _taken(pointer)
        time.sleep(_LOOK_S)
    if own is not None:
        shutil.rmtree(pointer.parent / own, ignore_errors=True)
    if _state(pointer) == before:
        pointer.unlink(missing_ok=True)


def _taken(pointer: Path) -> TopologyError:
    return TopologyError(
        f"another run meets in {pointer.parent} as {pointer.name.removeprefix('meet-')!r}; give this one a --link.port "
        "(any free number) or a --link.rendezvous of its own"
    )


def _state(pointer: Path) -> tuple[int, int] | None:
    """What changes with each beat. The file is opened, since network file systems only then ask the server anew."""
    try:
        with pointer.open("rb") as file:
            found = os.fstat(file.fileno())
            return found.st_ino, found.st_mtime_ns
    except OSError:
        return None


def _pointed_at(pointer: Path) -> str | None:
    try:
        own = pointer.read_text().strip()
    except OSError:
        return None
    return own if re.fullmatch(re.escape(pointer.name) + "-[0-9a-f]{16}", own) else None
