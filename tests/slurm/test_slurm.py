"""sbatch, srun and scancel as a user types them, on a private cluster of three nodes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.hostlist import host_names
from hpc.link.identity import ensure_local
from hpc.report.events import read_events, role_path
from tests.runs import ROOT, TINY, TRAIN, local
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.timeout(180)
# One thread everywhere, so that a job's losses can be equal to the bit.
SHORT = ("--train.max_steps", "10", "--run.threads", "1", "--run.save_adapter", "false", "--data.val_examples", "0")
RUN = [*TINY, *SHORT]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 2)
    return folder


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> list[float]:
    """Of the same run on one machine without Slurm."""
    found: list[float] = local(tmp_path_factory.mktemp("local"), keys, *SHORT).summary["losses"]
    return found


def flags(folder: Path, keys: Path, *more: str) -> list[str]:
    return [*RUN, "--run.output_dir", str(folder), "--link.keys_dir", str(keys), "--link.timeout_s", "60", *more]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def steps_done(folder: Path, role: str) -> int:
    path = role_path(folder, role)
    return sum(event["event"] == "step" for event in read_events(path)) if path.exists() else 0


def wait_for_step(cluster: Cluster, folder: Path, step: int, output: Path, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while steps_done(folder, "trunk-0") < step:
        said = output.read_text() if output.exists() else ""
        assert time.monotonic() < deadline, f"no step {step} after {timeout_s} s\n{said[-3000:]}\n{cluster.state()}"
        time.sleep(0.1)


def sbatch(cluster: Cluster, output: Path, *arguments: str, cwd: Path = ROOT) -> tuple[int, str]:
    """`sbatch --wait`: its exit code and what the job wrote."""
    done = cluster.run("sbatch", "--wait", f"--output={output}", *arguments, cwd=cwd, timeout_s=120)
    return done.returncode, output.read_text() if output.exists() else done.stderr


def test_a_job_gives_the_losses_of_a_local_run(
    cluster: Cluster, losses: list[float], keys: Path, tmp_path: Path
) -> None:
    """On three nodes; the repository is named with spaces and letters beyond ASCII, and so are the run and its output."""
    repository = tmp_path / "Bäume und Wälder"
    repository.symlink_to(ROOT)
    folder = tmp_path / "läuft hier"
    output = tmp_path / "ausgabe für %j.out"
    script = str(repository / "slurm" / "train.sh")
    code, _ = sbatch(cluster, output, "--nodes=3", script, *flags(folder, keys), cwd=tmp_path)
    (written,) = tmp_path.glob("ausgabe*.out")
    assert code == 0, written.read_text()[-3000:]
    assert summary(folder)["losses"] == losses


def test_plain_srun_starts_a_rank_each(cluster: Cluster, losses: list[float], keys: Path, tmp_path: Path) -> None:
    command = ("srun", "--ntasks=3", "--nodes=3", sys.executable, TRAIN, *flags(tmp_path / "run", keys))
    done = cluster.run(*command, timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "run")["losses"] == losses
