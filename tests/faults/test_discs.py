"""A disc that is full, and one that does not answer."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.nurslings import Nursery
from hpc.resume import committed_steps
from tests.faults.federation import federation
from tests.faults.record import record

pytestmark = pytest.mark.timeout(240)
SPARING = ("--train.max_steps", "30", "--train.min_clients", "1")


@pytest.fixture
def small_disc(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disc"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=20)


def fill(disc: Path) -> Path:
    path = disc / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return path


def test_a_full_disc_costs_checkpoints_and_not_the_run(nursery: Nursery, keys: Path, small_disc: Path) -> None:
    flags = ("--train.max_steps", "60", "--train.save_every", "5", "--train.save_total_limit", "1")
    with federation(nursery, small_disc, keys, *flags, "--run.save_adapter", "false", clients=2) as run:
        run.start()
        run.until(lambda: 5 in committed_steps(run.folder), "checkpoint", 60)
        filler = fill(small_disc)
        at = time.time()
        kept = committed_steps(run.folder)
        time.sleep(2)
        assert committed_steps(run.folder) == kept, "without room there is no new checkpoint, and the old one stays"
        filler.unlink()
        freed = time.time()
        assert set(run.end().values()) == {0}
        assert committed_steps(run.folder) == [60]
        assert not list(run.folder.glob("checkpoint-*/.*")), "no draft is left"
        record(
            fault=f"a full disc, for {freed - at:.0f} s",
            goes_on="all",
            lost="checkpoints and events while it is full",
            message="no checkpoint at step …: No space left on device; the run goes on, and its older checkpoints stay",
            noticed_s=None,
        )


@pytest.mark.parametrize("role", ["client-1", "trunk-0"])
def test_a_disc_that_does_not_answer_silences_its_role_only(
    role: str, nursery: Nursery, keys: Path, tmp_path: Path
) -> None:
    """A FIFO without a reader stands for the disc: opening it blocks in the kernel, without end."""
    timeout_s = 3.0
    with federation(nursery, tmp_path, keys, *SPARING, timeout_s=timeout_s) as run:
        events = run.folder / "roles" / role / "metrics.jsonl"
        events.parent.mkdir(parents=True)
        os.mkfifo(events)
        run.start()
        if role == "trunk-0":
            codes = run.end("client-0", "client-1", "client-2", within_s=60)
            assert set(codes.values()) == {1}
            why = run.said("client-0")
            assert "silent" in why
            goes_on, message, noticed = "nobody: the clients end after link.timeout_s", f"client-0: {why}", timeout_s
        else:
            lost = run.await_event("client_lost", client_id=1, within_s=60)
            began = run.events("trunk-0", "started")[0]["time"]
            assert set(run.end("trunk-0", "client-0", "client-2").values()) == {0}
            noticed = lost["time"] - began
            assert noticed < timeout_s + 3
            goes_on = "the others, after link.timeout_s"
            message = f"trunk-0: client 1 is lost; the run goes on without it: {lost['why']}"
        record(
            fault=f"a disc of {role.replace('-', ' ')} that does not answer (link.timeout_s {timeout_s:g})",
            goes_on=goes_on,
            lost="its part of the step under way" if role != "trunk-0" else "the steps since the last checkpoint",
            message=message,
            noticed_s=noticed,
        )
