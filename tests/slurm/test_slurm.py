"""sbatch, srun and scancel as a user types them, on a private cluster of three nodes."""

from __future__ import annotations

import json
import os
import signal
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
SHORT = (
    *("--train.max_steps", "10", "--train.lr_scheduler", "constant", "--data.val_examples", "0"),
    *("--run.threads", "1", "--run.save_adapter", "false"),
)
RUN = [*TINY, *SHORT]
LONGER = 40  # long enough for a signal to come in between


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 2)
    return folder


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> list[float]:
    """Of the same run on one machine without Slurm, with more steps: the first of them are a shorter run's."""
    folder = tmp_path_factory.mktemp("local")
    found: list[float] = local(folder, keys, *SHORT, "--train.max_steps", str(LONGER)).summary["losses"]
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
    """On three nodes; repository, run and output are named with spaces and letters beyond ASCII."""
    repository = tmp_path / "Bäume und Wälder"
    repository.symlink_to(ROOT)
    folder = tmp_path / "läuft hier"
    output = tmp_path / "ausgabe für %j.out"
    script = str(repository / "slurm" / "train.sh")
    code, _ = sbatch(cluster, output, "--nodes=3", script, *flags(folder, keys), cwd=tmp_path)
    (written,) = tmp_path.glob("ausgabe*.out")
    assert code == 0, written.read_text()[-3000:]
    assert summary(folder)["losses"] == losses[:10]


def test_plain_srun_starts_a_rank_each(cluster: Cluster, losses: list[float], keys: Path, tmp_path: Path) -> None:
    command = ("srun", "--ntasks=3", "--nodes=3", sys.executable, TRAIN, *flags(tmp_path / "run", keys))
    done = cluster.run(*command, timeout_s=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(tmp_path / "run")["losses"] == losses[:10]


def test_pmix_gives_the_ranks_too(cluster: Cluster) -> None:
    """Slurm's PMIx servers share one machine here, so all tasks are on one node."""
    program = (
        "import os, hpc.topology as t; w = t.read_world(os.environ); print(w.launcher, w.global_rank, w.world_size)"
    )
    command = ("srun", "--mpi=pmix", "--nodes=1", "--ntasks=3", sys.executable, "-c", program)
    done = cluster.run(*command)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"slurm {rank} 3" for rank in range(3)]


def test_node_lists_are_read_as_slurm_reads_them(cluster: Cluster) -> None:
    for nodes in ("rack[1-2]node[3-4]", "gpu[03-05,9],login", "n[08-11]", "a,b-1.site", "x[1]y[2,4-5],z[0]"):
        assert host_names(nodes) == cluster.run("scontrol", "show", "hostnames", nodes).stdout.split()


def test_too_many_tasks_are_refused(cluster: Cluster, keys: Path, tmp_path: Path) -> None:
    code, said = sbatch(cluster, tmp_path / "out", "--ntasks=4", "slurm/train.sh", *flags(tmp_path / "run", keys))
    assert code == 2
    (line,) = said.splitlines()
    for words in ("4 tasks", "--trunk.ranks 1", "--train.clients 2", "3 roles", "sbatch --ntasks=3"):
        assert words in line
    assert not (tmp_path / "run").exists()


SERVER_AND_CLIENTS = ("--partition=server", "--gres=gpu:1", ":", "--partition=clients", "--nodes=2")


def test_a_dry_run_in_a_job_shows_its_hosts(cluster: Cluster, keys: Path, tmp_path: Path) -> None:
    arguments = (*SERVER_AND_CLIENTS, "slurm/hetjob.sh", *flags(tmp_path / "run", keys, "--dry_run"))
    job = cluster.submit(f"--output={tmp_path / 'out'}", *arguments)
    cluster.wait_for(job, "COMPLETED", "FAILED")
    said = (tmp_path / "out").read_text()
    rows = [line.split()[:4] for line in said.splitlines()[:4]]
    assert rows == [
        ["rank", "host", "role", "device"],
        ["0", "node2", "trunk-0", "cuda:0"],
        ["1", "node1", "client-0", "cpu"],
        ["2", "node3", "client-1", "cpu"],
    ], said
    assert not (tmp_path / "run").exists()


def test_a_killed_client_does_not_end_a_heterogeneous_job(cluster: Cluster, keys: Path, tmp_path: Path) -> None:
    """The server on its partition with a (stand-in) GPU, the clients on theirs; one dies by SIGKILL."""
    folder, output = tmp_path / "run", tmp_path / "out"
    more = ("--train.min_clients", "1", "--train.max_steps", "60")
    job = cluster.submit(f"--output={output}", *SERVER_AND_CLIENTS, "slurm/hetjob.sh", *flags(folder, keys, *more))
    wait_for_step(cluster, folder, 3, output)
    (number,) = [task for task in cluster.tasks(job) if cluster.environ_of(task).get("RANK") == "2"]
    os.kill(number, signal.SIGKILL)
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    said = output.read_text()
    assert ended["JobState"] == "COMPLETED", said[-3000:]
    assert summary(folder)["steps"] == 60
    assert "client-1 was killed by SIGKILL" in said


def test_a_requeued_job_ends_with_the_same_losses(
    cluster: Cluster, losses: list[float], keys: Path, tmp_path: Path
) -> None:
    """Slurm's warning in mid-run: a checkpoint, another attempt of the same job, and no loss differs.

    All three steps share one node.
    """
    folder, output = tmp_path / "run", tmp_path / "out"
    job = cluster.submit(
        f"--output={output}", "--nodes=1", "slurm/train.sh", *flags(folder, keys, "--train.max_steps", str(LONGER))
    )
    wait_for_step(cluster, folder, 3, output)
    cluster.run("scancel", "--signal=USR1", "--batch", str(job))
    ended = cluster.wait_for(job, "COMPLETED", "FAILED", timeout_s=120)
    said = output.read_text()
    assert ended["JobState"] == "COMPLETED", said[-3000:]
    assert ended["Restarts"] == "1"
    assert f"job {job} is requeued" in said
    assert "restart 1; --run.resume_from_checkpoint latest" in said
    assert summary(folder)["losses"] == losses
