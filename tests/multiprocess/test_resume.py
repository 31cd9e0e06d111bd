"""Checkpoints of real processes: killed while they save, taken up elsewhere, and on a disc that is full."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.checkpoint import MANIFEST, step_of
from hpc.link.identity import ensure_local
from hpc.resume import committed_steps
from tests.multiprocess.test_schedules import processes_of, zero
from tests.runs import LOCAL, ROOT, TINY, clean_environment, local

pytestmark = pytest.mark.timeout(240)
RESUME = ("--run.resume_from_checkpoint", "latest")
STEPS = ("--train.max_steps", "6", "--train.save_every", "3", "--train.clients", "3", "--data.val_examples", "4")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 3)
    return folder


def cut_after_3(folder: Path) -> None:
    """As if the run had been killed behind its first checkpoint."""
    assert committed_steps(folder) == [3, 6]
    (folder / "checkpoint-6" / MANIFEST).unlink()
    (folder / "summary.json").unlink()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((), ("--link.transport", "mpi"), marks=pytest.mark.long),
        ((), ("--trunk.ranks", "2", *zero(2))),
        pytest.param(("--trunk.ranks", "2"), (), marks=pytest.mark.long),
        pytest.param(("--train.schedule", "replica"), ("--trunk.ranks", "2"), marks=pytest.mark.long),
        pytest.param(("--train.schedule", "replica", "--trunk.ranks", "2"), (), marks=pytest.mark.long),
    ],
    ids=["Gloo to MPI", "one rank to two with ZeRO 2", "two ranks to one", "replicas 1 to 2", "replicas 2 to 1"],
)
def test_a_run_goes_on_elsewhere(before: tuple[str, ...], after: tuple[str, ...], keys: Path, tmp_path: Path) -> None:
    """With another transport to the bit; with other trunk ranks as closely as they agree in one go."""
    schedule = before[:2] if "--train.schedule" in before else ()
    whole = local(tmp_path, keys, *STEPS, *before).summary
    cut_after_3(tmp_path)
    again = local(tmp_path, keys, *STEPS, *schedule, *after, *RESUME)
    assert again.summary["transport"] == ("mpi" if "mpi" in after else "gloo")
    assert again.summary["trunk_ranks"] == (2 if "2" in after[1:2] else 1)
    assert "going on from checkpoint-3; passed over checkpoint-6: it has no manifest.json" in again.err
    exact = "mpi" in after
    losses = whole["losses"]
    assert again.summary["losses"] == (losses if exact else pytest.approx(losses, rel=1e-5))


@pytest.fixture
def small_disc(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 KiB in the place of one checkpoint."""
    folder = tmp_path / "run" / "checkpoint-4"
    folder.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disc_that_is_really_full(small_disc: Path, keys: Path, tmp_path: Path) -> None:
    flags = ("--train.max_steps", "6", "--train.save_every", "2", "--data.val_examples", "0")
    run = local(tmp_path / "run", keys, *flags)
    assert run.summary["steps"] == 6
    assert committed_steps(tmp_path / "run") == [2, 6]
    assert not list(small_disc.iterdir())
    assert [failed["step"] for failed in run.summary["failed_checkpoints"]] == [4]
    assert "No space left on device" in run.summary["failed_checkpoints"][0]["why"]
    assert "no checkpoint at step 4" in run.err
    assert "Not saved: 1 checkpoint (step 4" in run.out


def start(folder: Path, keys: Path, *flags: str) -> subprocess.Popen[str]:
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(keys), *flags]
    return subprocess.Popen(
        [sys.executable, LOCAL, *TINY, *own], cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True
    )


def kill_while_saving(run: subprocess.Popen[str], folder: Path, delay_s: float) -> None:
    """Kill every role a moment after the run began to save what no run before it did."""
    deadline = time.monotonic() + 120
    victims: dict[int, int] = {}
    last = max((step_of(path) for path in folder.glob("checkpoint-*")), default=0)
    while len(victims) < 3:
        assert time.monotonic() < deadline, "no roles"
        victims = processes_of(folder)
    while not (folder / f"checkpoint-{last + 2}").exists():
        assert run.poll() is None, run.stderr and run.stderr.read()
        assert time.monotonic() < deadline, "no checkpoint was begun"
        time.sleep(0.001)
    time.sleep(delay_s)
    for pid in victims.values():
        os.kill(pid, signal.SIGKILL)
    run.communicate(timeout=60)


@pytest.mark.slow
def test_killed_while_saving_and_resumed_equals_uninterrupted(keys: Path, tmp_path: Path) -> None:
    """A checkpoint at every step, and kills in the midst: between a file and the manifest, or during a removal."""
    flags = ("--train.max_steps", "30", "--train.save_every", "1", "--train.save_total_limit", "2")
    whole = local(tmp_path / "whole", keys, *flags).summary
    folder, draw = tmp_path / "cut", random.Random(0)
    resume: tuple[str, ...] = ()
    for _ in range(2):
        kill_while_saving(start(folder, keys, *flags, *resume), folder, draw.uniform(0, 0.02))
        assert committed_steps(folder)
        resume = RESUME
    finished = local(folder, keys, *flags, *resume)
    assert finished.summary["losses"] == whole["losses"]
    assert finished.summary["eval"]["accuracy"] == whole["eval"]["accuracy"]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-29", "checkpoint-30"]
    for path in folder.glob(f"checkpoint-*/{MANIFEST}"):
        assert len(json.loads(path.read_text())["files"]) == 3
        assert len(list(path.parent.iterdir())) == 4
