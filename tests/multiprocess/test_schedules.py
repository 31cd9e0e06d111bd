"""The schedules in real processes: several trunk ranks, MPI, kill -9, and what is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpc.link.identity import ensure_local
from tests.multiprocess.test_local import STEPS, assert_bounds, assert_refused, grad_norms
from tests.runs import LOCAL, ROOT, TINY, Finished, clean_environment, local, rank_of

pytestmark = pytest.mark.timeout(240)
THREE = (*STEPS, "--train.clients", "3", "--train.sync_every", "2", "--data.val_examples", "0")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 3)
    return folder


@pytest.fixture(scope="module")
def client_batch(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Finished:
    return local(tmp_path_factory.mktemp("client_batch"), keys, *THREE)


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Finished:
    return local(tmp_path_factory.mktemp("replica"), keys, *THREE, "--train.schedule", "replica")


def zero(stage: int) -> tuple[str, ...]:
    return ("--trunk.deepspeed", str(ROOT / "slurm" / "deepspeed" / f"zero{stage}.json"))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--trunk.ranks", "2"), marks=pytest.mark.long),
        ("--trunk.ranks", "2", *zero(2)),
        pytest.param(("--link.transport", "mpi"), marks=pytest.mark.long),
    ],
    ids=["two ranks", "two ranks, ZeRO 2", "MPI"],
)
def test_pipelined_equals_client_batch(
    flags: tuple[str, ...], client_batch: Finished, keys: Path, tmp_path: Path
) -> None:
    summary = local(tmp_path, keys, *THREE, "--train.schedule", "pipelined", *flags).summary
    assert_bounds(summary["losses"], client_batch.summary["losses"])
    assert grad_norms(tmp_path) == pytest.approx(grad_norms(client_batch.folder), rel=1e-4)
    assert 0 <= summary["trunk_idle_share"] <= 1


def test_replicas_spread_over_two_ranks_and_averaged_under_masks(replica: Finished, keys: Path, tmp_path: Path) -> None:
    flags = ("--train.schedule", "replica", "--trunk.ranks", "2", "--train.secure_aggregation", "true")
    summary = local(tmp_path, keys, *THREE, *flags).summary
    assert summary["losses"] == pytest.approx(replica.summary["losses"], rel=1e-6)
    assert summary["averages"]["count"] == 2
    assert summary["parameters_by_role"]["trunk-0"]["trunk"]["trainable"] == 2 * 16384  # clients 0 and 2
    assert summary["parameters_by_role"]["trunk-1"]["trunk"]["trainable"] == 16384


def test_a_base_partitioned_over_the_ranks(replica: Finished, keys: Path, tmp_path: Path) -> None:
    """ZeRO 3; one of three clients a round, so that a rank without a client has to keep in step."""
    own = ("--train.schedule", "replica", "--train.clients_per_round", "1", "--data.val_examples", "4")
    plain = local(tmp_path / "plain", keys, *THREE, *own).summary
    summary = local(tmp_path / "zero", keys, *THREE, *own, "--trunk.ranks", "2", *zero(3)).summary
    assert summary["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert summary["eval"]["loss"] == pytest.approx(plain["eval"]["loss"], rel=1e-5)


def start(folder: Path, keys: Path, *flags: str) -> subprocess.Popen[str]:
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(keys), *flags]
    return subprocess.Popen(
        [sys.executable, LOCAL, *TINY, *own], cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True
    )


def processes_of(folder: Path) -> dict[int, int]:
    """Global rank → process id."""
    found = subprocess.run(["pgrep", "-f", f"train.py.*{folder}"], capture_output=True, text=True, check=False)
    ranks: dict[int, int] = {}
    for pid in found.stdout.split():
        rank = rank_of(int(pid), folder)
        if rank is not None:
            ranks[rank] = int(pid)
    return ranks


def wait_for_steps(folder: Path, client: int, steps: int, run: subprocess.Popen[str]) -> None:
    events = folder / "roles" / f"client-{client}" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (events.exists() and events.read_text().count('"step", ') + 1 > steps):
        assert time.monotonic() < deadline, "no step was taken"
        assert run.poll() is None, run.stderr and run.stderr.read()
        time.sleep(0.1)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(("--train.schedule", "pipelined"), marks=pytest.mark.long),  # tests/faults kills clients, too
        ("--train.schedule", "replica", "--train.secure_aggregation", "true", "--train.sync_every", "2"),
    ],
    ids=["pipelined", "replica under masks"],
)
def test_the_others_go_on_without_a_killed_client(schedule: tuple[str, ...], keys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "o"
    flags = ("--train.clients", "3", "--train.min_clients", "2", "--train.max_steps", "60", "--data.val_examples", "0")
    run = start(folder, keys, *flags, *schedule, "--link.timeout_s", "30")
    wait_for_steps(folder, 1, 4, run)
    os.kill(processes_of(folder)[2], signal.SIGKILL)
    assert run.stderr is not None
    _, err = run.communicate(timeout=100)
    assert run.returncode == 0, err[-2000:]
    summary = Finished(code=0, out="", err=err, folder=folder).summary
    assert [lost["client_id"] for lost in summary["lost_clients"]] == [1]
    assert "client 1 is lost" in err
    assert summary["steps"] == 60
    assert not processes_of(folder)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--train.schedule", "replica", *zero(1)), ("ZeRO stage 1", "--train.schedule replica", "--trunk.ranks")),
        (("--train.schedule", "pipelined", *zero(3)), ("ZeRO stage 3", "client_batch")),
        pytest.param(
            ("--train.clients_per_round", "5"),
            ("--train.clients_per_round 5 exceeds --train.clients 2",),
            marks=pytest.mark.long,
        ),
        (
            (
                "--train.schedule",
                "replica",
                "--adapter.method",
                "full",
                "--trunk.replica_limit_gib",
                "0.0001",
            ),
            ("--trunk.replica_limit_gib is 0.0001", "2 clients"),
        ),
        pytest.param(
            ("--train.schedule", "serial", "--train.secure_aggregation", "true"),
            ("--train.secure_aggregation",),
            marks=pytest.mark.long,
        ),
        pytest.param(("--train.micro_batches", "3"), ("--train.micro_batches 3", "pipelined"), marks=pytest.mark.long),
        pytest.param(
            ("--trunk.smashed_cache_mib", "8"), ("--trunk.smashed_cache_mib", "--adapter.parts"), marks=pytest.mark.long
        ),
    ],
)
def test_what_does_not_go_together_is_refused(flags: tuple[str, ...], words: Any, keys: Path, tmp_path: Path) -> None:
    assert_refused(local(tmp_path / "out", keys, *flags), *words)
