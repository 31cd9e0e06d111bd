"""Inside a Slurm job, as its batch script: start a step for each role, watch them, requeue. Imports no torch.

A client that dies does not end the job if the run can do without it (`train.min_clients`). SIGUSR1 (Slurm's warning
before the time limit) and SIGTERM are passed on to the trunk, which writes a checkpoint; then the job is requeued.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from hpc import supervision
from hpc.config import Config
from hpc.errors import TopologyError
from hpc.launcher import THREADS, child_environment
from hpc.placement import Seat
from hpc.roles import GRACE_S
from hpc.slurm_hosts import Ask, scontrol
from hpc.slurm_steps import step_command, step_environment
from hpc.supervision import PAUSED, SIGNALLED, worth_requeueing
from hpc.topology import port_of_job

POLL_S = 0.1
MANIFEST = "manifest.json"  # as hpc.checkpoint has it, which brings torch
WARNINGS = (signal.SIGUSR1, signal.SIGTERM)


class SlurmJob:
    """The steps of one job."""

    def __init__(self, config: Config, seats: Sequence[Seat], command: Sequence[str]) -> None:
        """`command`: what every role runs."""
        self.config, self.seats, self.command = config, seats, list(command)
        self.job_id = os.environ["SLURM_JOB_ID"]
        self._steps: dict[str, subprocess.Popen[bytes]] = {}
        self._restarts: dict[str, int] = {}
        self._failed: list[tuple[str, int]] = []
        self._asked: signal.Signals | None = None
        self._deadline: float | None = None
        self._begun = time.time()

    def run(self) -> int:
        """Until the run has ended; the exit code of the job."""
        for number in WARNINGS:
            signal.signal(number, self._be_asked)
        try:
            for seat in self.seats:
                self._start(seat)
            self._watch()
            codes = self._poll()  # before those are ended that took too long
        finally:
            self._stop()
        return self._conclude(codes)

    def _be_asked(self, number: int, frame: object) -> None:
        self._asked = self._asked or signal.Signals(number)

    def _start(self, seat: Seat) -> None:
        trunk_0 = self.seats[0].host
        environ = child_environment(os.environ) | {THREADS: str(seat.threads)}
        environ = step_environment(
            environ,
            seat,
            roles=len(self.seats),
            address=trunk_0.address,
            port=self.config.link.port or port_of_job(int(self.job_id)),
        )
        has_gpus = any(each.host.gpus for each in self.seats)
        self._steps[seat.role] = subprocess.Popen(
            [*step_command(seat, job_has_gpus=has_gpus), *self.command],
            env=environ,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def _clients(self) -> list[str]:
        """Roles that the run may be able to do without."""
        spares = self.config.train.min_clients > 0
        return [seat.role for seat in self.seats if spares and seat.role.startswith("client")]

    def _watch(self) -> None:
        """Until all steps have ended well, or one has failed and the others have had their time to end."""
        told = ended = False
        while any(code is None for code in self._poll().values()):
            if self._asked and not told:
                told = True
                self._pass_on(self._asked)
            codes = self._poll()
            fatal = supervision.fatal(codes, self._clients, self.config.train.min_clients)
            if not ended and (fatal or supervision.served(codes, self._clients)):
                ended = True
                self._deadline = min(self._deadline or math.inf, time.monotonic() + GRACE_S)
            if self._deadline is None:
                self._bring_back(codes)
            elif time.monotonic() > self._deadline:
                return
            time.sleep(POLL_S)

    def _poll(self) -> dict[str, int | None]:
        """Every role's exit code; tells of each failure once."""
        codes = {role: step.poll() for role, step in self._steps.items()}
        for role, code in codes.items():
            if code and (role, code) not in self._failed:
                self._failed.append((role, code))
                if code != PAUSED:
                    say(f"{role} {how(code)}")
        return codes

    def _pass_on(self, number: signal.Signals) -> None:
        """srun hands SIGUSR1 on to its task; SIGTERM it would take for itself.

        Where Slurm ends the job (limit, preemption, scancel) it has sent SIGTERM to the roles too, and would a second
        signal come they would end at once.
        """
        wait_s = self.config.run.grace_s + GRACE_S
        self._deadline = time.monotonic() + wait_s
        if number == signal.SIGTERM and self._described().get("JobState") != "RUNNING":
            say(f"{number.name}: Slurm ends the job; waiting up to {wait_s:g} s for a checkpoint")
            return
        say(f"{number.name}: the trunk is asked for a checkpoint; waiting up to {wait_s:g} s")
        for role, step in self._steps.items():
            if not role.startswith("client") and step.poll() is None:
                step.send_signal(signal.SIGUSR1)

    def _bring_back(self, codes: dict[str, int | None]) -> None:
        allowed = self.config.run.client_restarts
        for seat in self.seats:
            count = self._restarts.get(seat.role, 0)
            if seat.role in self._clients and supervision.may_return(codes[seat.role], count, allowed):
                self._restarts[seat.role] = count + 1
                self._failed = [each for each in self._failed if each[0] != seat.role]
                say(f"{seat.role} is started again ({count + 1} of {allowed})")
                self._start(seat)

    def _conclude(self, codes: dict[str, int | None]) -> int:
        """The exit code of the job, which is requeued first if the run was interrupted."""
        trunk = codes[self.seats[0].role]
        if trunk == PAUSED or (self._asked and (trunk is None or supervision.killed(trunk))):
            if trunk != PAUSED:
                say("the trunk wrote no checkpoint in time; the run goes on from the one before, if there is one")
            self._requeue()
            return PAUSED
        fatal = supervision.fatal(codes, self._clients, self.config.train.min_clients)
        if not fatal:
            return 0
        role, code = supervision.cause([each for each in self._failed if each[0] in fatal])
        say(f"the run has failed: {role} {how(code)}; what it said is above")
        return code if code > 0 else 1

    def _requeue(self) -> None:
        """Unless Slurm does it already, was told not to, or the user cancelled the job."""
        job = self._described()
        if job.get("JobState") != "RUNNING":
            say(f"the job is {job.get('JobState', 'unknown to Slurm')}, so it is left to Slurm")
        elif not worth_requeueing(self._progressed(), seconds_left(job.get("EndTime", ""))):
            say(
                "no checkpoint was written within the time limit, so another attempt would not get further; give more "
                "--time, or a smaller --train.save_every"
            )
        elif job.get("Requeue") != "1":
            say("the job may not be requeued (sbatch --requeue); go on with --run.resume_from_checkpoint latest")
        else:
            say(f"job {self.job_id} is requeued, to go on from its last checkpoint")
            ask_calmly("requeue", self.job_id)

    def _described(self) -> dict[str, str]:
        """The job as Slurm sees it."""
        lines = ask_calmly("show", "job", "--oneliner", self.job_id).splitlines()
        return dict(re.findall(r"(\S+?)=(\S*)", lines[0])) if lines else {}

    def _progressed(self) -> bool:
        """Whether this attempt has committed a checkpoint."""
        manifests = Path(str(self.config.run.folder)).glob(f"checkpoint-*/{MANIFEST}")
        return any(path.stat().st_mtime >= self._begun for path in manifests)

    def _stop(self) -> None:
        """End what still runs. srun ends its step when it is terminated."""
        for number, wait_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 3.0)):
            alive = [step for step in self._steps.values() if step.poll() is None]
            for step in alive:
                with suppress(ProcessLookupError):
                    step.send_signal(number)
            deadline = time.monotonic() + wait_s
            for step in alive:
                with suppress(subprocess.TimeoutExpired):
                    step.wait(max(0.0, deadline - time.monotonic()))


def seconds_left(end_time: str) -> float:
    """Until the job's time limit, from what `scontrol` calls EndTime; without a limit, infinite."""
    try:
        return datetime.fromisoformat(end_time).timestamp() - time.time()
    except ValueError:
        return math.inf


def how(code: int) -> str:
    """An exit code of srun in words."""
    number = -code if code < 0 else code - SIGNALLED
    if number in {each.value for each in signal.Signals}:
        return f"was killed by {signal.Signals(number).name}"
    return f"ended with exit code {code}"


def say(text: str) -> None:
    """A line of the job's own, among those of its roles."""
    print(f"job: {text}", file=sys.stderr, flush=True)


def ask_calmly(*arguments: str, ask: Ask = scontrol) -> str:
    """What `scontrol` says; at the end of a job its refusal is told, not raised."""
    try:
        return ask(*arguments)
    except TopologyError as error:
        say(str(error))
        return ""
