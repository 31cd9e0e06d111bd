"""What a job's batch step does when its roles end one way or another; srun and scontrol are stand-ins, the roles short.

The same with Slurm and real roles: tests/slurm.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.runs import ROOT

# Runs the role in its own place, as srun runs its task: SIGUSR1 reaches it.
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "$*" >> "$(dirname "$0")/asked"
[ "$1" = show ] && echo "JobId=7 Requeue={requeue} JobState={state} EndTime={end}"
exit 0
"""
# A role: waits until it is asked to stop (75), for so long, or ends with a code at once; told by its rank.
ROLE = """\
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
open(sys.argv[0] + '.' + os.environ['RANK'], 'a').write('started ')
exec(sys.argv[1:][int(os.environ['RANK'])])
"""
JOB = """\
import sys
import hpc.slurm_job
from hpc.config import Config, RunConfig, TrainConfig
from hpc.placement import Host, place_roles
least, restarts, grace_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
train = TrainConfig(clients=2, min_clients=least)
run = RunConfig(client_restarts=restarts, grace_s=grace_s, output_dir=sys.argv[4])
config = Config(train=train, run=run)
hpc.slurm_job.GRACE_S = 1.0
seats = place_roles([Host(name="n", address="127.0.0.1", tasks=3, cpus=3)], config)
sys.exit(hpc.slurm_job.SlurmJob(config, seats, [sys.executable, *sys.argv[5:]]).run())
"""
FINE, FAILS, BAD_INPUT, WAITS = "time.sleep(0.3)", "sys.exit(1)", "sys.exit(2)", "time.sleep(20)"
STEPS = "time.sleep(2)"
KILLED = "os.kill(os.getpid(), 9)"


@dataclass(kw_only=True)
class Ended:
    code: int
    said: str
    folder: Path

    def starts(self, rank: int) -> int:
        return (self.folder / f"role.py.{rank}").read_text().split().count("started")

    @property
    def requeued(self) -> bool:
        asked = self.folder / "bin" / "asked"
        return asked.exists() and "requeue 7" in asked.read_text().splitlines()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "bin").mkdir()
    (tmp_path / "role.py").write_text(ROLE)
    answers(tmp_path)
    return tmp_path


def answers(folder: Path, *, requeue: int = 1, state: str = "RUNNING", end: str = "Unknown") -> None:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL.format(requeue=requeue, state=state, end=end))):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)


def run(folder: Path, *roles: str, least: int = 0, restarts: int = 0, warn: int = 0, grace_s: float = 5) -> Ended:
    """`roles`: what the trunk and the two clients do. `warn`: a signal to the job once all have started."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    settings = [str(least), str(restarts), str(grace_s), str(folder / "run")]
    process = subprocess.Popen(
        [sys.executable, "-c", JOB, *settings, str(folder / "role.py"), *roles],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 20
        while warn and not all((folder / f"role.py.{rank}").exists() for rank in range(3)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        if warn:
            process.send_signal(warn)
        said = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    return Ended(code=process.returncode, said=said, folder=folder)


def test_a_run_that_ends_well(job: Path) -> None:
    ended = run(job, FINE, FINE, FINE)
    assert (ended.code, ended.said, ended.requeued) == (0, "", False)


def test_the_cause_gives_the_exit_code(job: Path) -> None:
    """A client was told wrong; the trunk fails because it is gone."""
    ended = run(job, "time.sleep(0.3); sys.exit(1)", BAD_INPUT, WAITS)
    assert ended.code == 2
    assert "the run has failed: client-0 ended with exit code 2" in ended.said
    assert not ended.requeued


def test_a_client_that_dies_ends_a_run_that_needs_it(job: Path) -> None:
    ended = run(job, WAITS, FINE, KILLED)
    assert ended.code == 1
    assert "the run has failed: client-1 was killed by SIGKILL" in ended.said


def test_a_client_that_dies_does_not_end_a_run_that_can_do_without(job: Path) -> None:
    ended = run(job, STEPS, FINE, KILLED, least=1)
    assert ended.code == 0
    assert "client-1 was killed by SIGKILL" in ended.said
    assert ended.starts(2) == 1


def test_a_dead_client_is_started_again_so_many_times(job: Path) -> None:
    ended = run(job, STEPS, STEPS, KILLED, least=1, restarts=2)
    assert ended.code == 0
    assert ended.starts(2) == 3
    assert "client-1 is started again (2 of 2)" in ended.said
    assert ended.starts(1) == 1


def test_a_client_that_lingers_does_not_spoil_a_run_that_has_ended(job: Path) -> None:
    assert run(job, FINE, WAITS, WAITS, least=1).code == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_pauses_the_trunk_and_requeues_the_job(number: int, job: Path) -> None:
    """Clients are not told: they end as the trunk leaves them."""
    ended = run(job, WAITS, "time.sleep(1); sys.exit(75)", "time.sleep(1); sys.exit(75)", warn=number)
    assert ended.code == 75
    assert ended.requeued
    assert f"{signal.Signals(number).name}: the trunk is asked for a checkpoint" in ended.said


@pytest.mark.parametrize(
    ("requeue", "state", "word"), [(0, "RUNNING", "--requeue"), (1, "CANCELLED", "CANCELLED"), (1, "PREEMPTED", "left")]
)
def test_what_slurm_or_the_user_decided_is_not_undone(requeue: int, state: str, word: str, job: Path) -> None:
    answers(job, requeue=requeue, state=state)
    ended = run(job, WAITS, FINE, FINE, warn=signal.SIGUSR1)
    assert (ended.code, ended.requeued) == (75, False)
    assert word in ended.said


def test_a_trunk_without_a_checkpoint_in_time_is_requeued_all_the_same(job: Path) -> None:
    deaf = "signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(20)"
    ended = run(job, deaf, "time.sleep(3)", "time.sleep(3)", warn=signal.SIGUSR1, grace_s=0.5)
    assert (ended.code, ended.requeued) == (75, True)
    assert "no checkpoint in time" in ended.said


def test_a_run_that_ends_before_the_warning_is_heard_is_not_requeued(job: Path) -> None:
    done = "signal.signal(signal.SIGUSR1, signal.SIG_IGN); time.sleep(1)"
    ended = run(job, done, FINE, FINE, warn=signal.SIGUSR1)
    assert (ended.code, ended.requeued) == (0, False)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_time_limit_that_allows_no_checkpoint_ends_the_job(checkpoint: bool, job: Path) -> None:
    answers(job, end=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 60)))
    folder = job / "run" / "checkpoint-3"
    folder.mkdir(parents=True)
    saves = f"open({str(folder / 'manifest.json')!r}, 'w').close(); time.sleep(20)" if checkpoint else WAITS
    ended = run(job, saves, FINE, FINE, warn=signal.SIGUSR1)
    assert (ended.code, ended.requeued) == (75, checkpoint)
    assert ("more --time" in ended.said) != checkpoint


def test_where_slurm_ends_the_job_the_trunk_is_not_asked_twice(job: Path) -> None:
    """A second signal would end it without its checkpoint."""
    answers(job, state="PREEMPTED")
    counts = "signal.signal(signal.SIGUSR1, lambda *_: open(sys.argv[0] + '.asked', 'w')); time.sleep(1); sys.exit(75)"
    ended = run(job, counts, FINE, FINE, warn=signal.SIGTERM)
    assert (ended.code, ended.requeued) == (75, False)
    assert not (job / "role.py.asked").exists()
