"""A private Slurm cluster: munged, slurmctld and three slurmd on this machine, in a temporary folder.

Nothing of it touches the machine's own Slurm or munge: key, sockets, ports and state are its own. Whatever it started
carries its SLURM_CONF in its environment, and that is how the end finds it all.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.runs import ROOT, clean_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
START_S = 30.0
NODES = 3
CONFIG = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as credentials live (120 s unless set).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerNode=1000
# Only the backfill scheduler starts heterogeneous jobs.
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdSpoolDir={folder}/spool-%n
{nodes}
PartitionName=all Nodes=node[1-3] Default=YES MaxTime=INFINITE State=UP
PartitionName=server Nodes=node2 MaxTime=INFINITE State=UP
PartitionName=clients Nodes=node1,node3 MaxTime=INFINITE State=UP
"""


@dataclass(kw_only=True)
class Cluster:
    """The running cluster. `environ` is what a user of it has set."""

    folder: Path
    environ: dict[str, str]

    def run(self, *command: str, timeout_s: float = 60, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        """A command of a user. Past the deadline the test fails and all jobs are cancelled."""
        try:
            return subprocess.run(
                command,
                cwd=cwd,
                env=self.environ,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            said = error.stdout.decode(errors="replace")[-2000:] if error.stdout else ""
            raise AssertionError(f"no end within {timeout_s} s: {' '.join(command)}\n{said}\n{self.state()}") from None

    def submit(self, *arguments: str, cwd: Path = ROOT) -> int:
        """`sbatch arguments`; the job's number."""
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.strip().partition(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", "-o", str(number)).stdout))

    def wait_for(self, number: int, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Until the job is in one of these states."""
        deadline = time.monotonic() + timeout_s
        while (found := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {found} after {timeout_s} s\n{self.state()}"
            time.sleep(0.2)
        return found

    def tasks(self, number: int) -> list[int]:
        """Process ids of the roles of a job, which `srun` gave their ranks."""
        wanted = {"SLURM_JOB_ID": str(number), "SLURM_CONF": self.environ["SLURM_CONF"]}
        found = []
        for process in _processes_of(self.folder):
            environ = self.environ_of(process)
            is_role = b"train.py" in _read(process, "cmdline") and "SLURM_STEP_ID" in environ
            if is_role and wanted.items() <= environ.items():
                found.append(process)
        return found

    def environ_of(self, process: int) -> dict[str, str]:
        pairs = (entry.decode(errors="replace").partition("=") for entry in _read(process, "environ").split(b"\0"))
        return {name: value for name, _, value in pairs}

    def state(self) -> str:
        """For the message of a failed test."""
        logs = [f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")]
        return "\n".join([_quiet("sinfo", self.environ), _quiet("squeue", self.environ), *logs])


def missing() -> str:
    """Why there can be no cluster here; empty if there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    return f"not installed: {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else ""


@contextmanager
def private_cluster() -> Iterator[Cluster]:
    """Start it, wait until all nodes are idle, and leave no process behind."""
    # A short path: the name of a socket is at most 107 characters long.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    environ = clean_environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=_path(), HPC_PYTHON=sys.executable)
    cluster = Cluster(folder=folder, environ=environ)
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _configure(folder)
        daemons.append(_start_munge(folder, environ))
        daemons.append(_start(["slurmctld", "-D"], folder, environ))
        daemons += [_start(["slurmd", "-D", "-N", f"node{n}"], folder, environ) for n in range(1, NODES + 1)]
        _wait_until_idle(cluster, daemons)
        yield cluster
    finally:
        _quiet("scancel --me --signal=KILL --full", environ)
        _end(daemons, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _path() -> str:
    """Daemons are in sbin, which a user's PATH may lack."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"


def _configure(folder: Path) -> None:
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    ports = _free_ports(NODES + 1)
    host = socket.gethostname().partition(".")[0]
    nodes = "\n".join(
        f"NodeName=node{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=4 RealMemory=6000 State=UNKNOWN"
        + (" Gres=gpu:2" if n == 2 else "")
        for n in range(1, NODES + 1)
    )
    text = CONFIG.format(host=host, controller_port=ports[0], user=getpass.getuser(), folder=folder, nodes=nodes)
    (folder / "slurm.conf").write_text(text)
    # Any two devices: enough to place by, and it works where there is no GPU.
    devices = ("/dev/null", "/dev/zero")
    (folder / "gres.conf").write_text("".join(f"NodeName=node2 Name=gpu File={each}\n" for each in devices))


def _free_ports(count: int) -> list[int]:
    with _bound_sockets(count) as sockets:
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _bound_sockets(count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield sockets
    finally:
        for each in sockets:
            each.close()


def _start_munge(folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    names = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{ending}" for option, ending in names.items()]
    process = _start(["munged", "--foreground", "--force", "--num-threads=2", *options], folder, environ)
    deadline = time.monotonic() + START_S
    while not (folder / "munge.socket").exists():
        assert process.poll() is None, (folder / "munged.log").read_text()
        assert time.monotonic() < deadline, "munged made no socket"
        time.sleep(0.05)
    return process


def _start(command: list[str], folder: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    program = shutil.which(command[0], path=environ["PATH"])
    assert program is not None
    with (folder / f"{command[0]}.log").open("ab") as log:
        return subprocess.Popen(
            [program, *command[1:]],
            env=environ,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _wait_until_idle(cluster: Cluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_S
    while _quiet("sinfo --noheader --Node --partition all --format %T", cluster.environ).split() != ["idle"] * NODES:
        ended = [process.args for process in daemons if process.poll() is not None]
        assert not ended, f"{ended} ended\n{cluster.state()}"
        assert time.monotonic() < deadline, f"nodes are not idle after {START_S} s\n{cluster.state()}"
        time.sleep(0.1)


def _quiet(command: str, environ: dict[str, str]) -> str:
    with suppress(subprocess.TimeoutExpired, OSError):
        return subprocess.run(
            command.split(), env=environ, capture_output=True, text=True, timeout=10, check=False
        ).stdout
    return ""


def _end(daemons: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """Nodes first, then the controller, then munge; then what they had started and what left their process groups."""
    for process in reversed(daemons):
        process.terminate()
    for process in reversed(daemons):
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        process.kill()
        process.wait(timeout=5)
    for number in _processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _processes_of(folder: Path) -> list[int]:
    """Processes with this cluster's configuration in their environment, but for this one."""
    mark = f"SLURM_CONF={folder / 'slurm.conf'}".encode()
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if number != os.getpid() and mark in _read(number, "environ").split(b"\0")]


def _read(process: int, name: str) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{process}/{name}").read_bytes()
    return b""
