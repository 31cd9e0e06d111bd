"""A process that imports once what every role of a run needs, and forks a process for each role that is asked for.

For runs on one machine without a GPU: importing torch, transformers and PEFT costs a process some five seconds of CPU
and 350 MiB, which forked roles share until they write to it. `hpc.nurslings` starts this process and asks, one JSON
object a line over a socket: `{"number", "environ", "keep"}` is answered by `{"number", "pid"}`, and when that role has
ended by `{"number", "code"}`. Nothing secret is here: roles read their keys themselves.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from hpc.errors import HpcError
from hpc.imports import importing
from hpc.quantizer import leave_out_unless

# Only what every role imports: a role's peak memory counts what it was forked with.
IMPORTS = (
    "hpc.federation",
    "hpc.client",
    "hpc.server",
    "hpc.build_trunk",
    "hpc.data.dataset",
    "hpc.link.peers",
    "hpc.preflight",
    "peft",
)
ROOM = "HPC_NURSERY_ROOM"  # spaces in the environment's memory, in which a role's own variables are shown to `ps`
POLL_S = 0.05
SET_PDEATHSIG = 1  # linux/prctl.h


def main(argv: list[str], imports: Sequence[str] = IMPORTS) -> int:
    """`argv`: the socket's descriptor, descriptors to hand down ("3,4" or ""), `trunk.quantization`, script, arguments.

    Returns 0 once the other end of the socket is closed. A forked role runs the script as Python would, and exits.
    """
    control, shared, quantization, script, *arguments = argv
    _end_with_parent()
    _import(imports, quantization)
    with socket.socket(fileno=int(control)) as line:
        role = _tend(line, [int(number) for number in shared.split(",") if number])
    if role is None:
        return 0
    _become(role["environ"])
    sys.argv = [script, *arguments]
    sys.path[0] = str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        _leave(end.code)
    _leave(None)


def _import(names: Sequence[str], quantization: str) -> None:
    leave_out_unless(quantization)
    with importing(), _one_thread_of_openblas():
        for name in names:
            importlib.import_module(name)
    gc.freeze()  # else the first collection in each role would write to, and so copy, every object's header


@contextmanager
def _one_thread_of_openblas() -> Iterator[None]:
    """It would start one for each core on import, and a process with threads must not be forked.

    numpy brings one, and so does SciPy, which transformers imports where scikit-learn is installed.
    """
    given = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OPENBLAS_NUM_THREADS"]
    if given is not None:
        os.environ["OPENBLAS_NUM_THREADS"] = given


def _tend(line: socket.socket, shared: Sequence[int]) -> dict[str, Any] | None:
    """Fork and reap until the launcher is gone: then None. In a forked role: what was asked for."""
    numbers: dict[int, int] = {}  # process id → number of the role
    unread = b""
    try:
        while True:
            if select.select([line], [], [], POLL_S if numbers else None)[0]:
                heard = line.recv(1 << 16)
                if not heard:
                    return None
                *asked, unread = (unread + heard).split(b"\n")
                for role in map(json.loads, asked):
                    pid = _fork(line, [number for number in shared if number not in role["keep"]])
                    if pid == 0:
                        numbers.clear()  # siblings are none of a role's business
                        return dict(role)
                    numbers[pid] = role["number"]
                    _tell(line, number=role["number"], pid=pid)
            for pid, code in _ended(numbers):
                _tell(line, number=numbers.pop(pid), code=code)
    except ConnectionError:
        return None
    finally:
        _end(numbers)


def _fork(line: socket.socket, foreign: Sequence[int]) -> int:
    """The role's process id here, 0 in the role: in a session of its own before this returns here."""
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise HpcError(f"{threads - 1} threads run where roles are to be forked; start again with HPC_NURSERY=0")
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    waits, tells = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tells)
        os.read(waits, 1)  # nothing comes: its end says that the session is there, so that its group can be killed
        os.close(waits)
        return pid
    os.setsid()
    _end_with_parent(parent)
    line.close()
    for number in (waits, tells, *foreign):
        os.close(number)
    return 0


def _end_with_parent(parent: int | None = None) -> None:
    """Be killed when the parent dies, however it dies; now, if it is not `parent` any more."""
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def _become(own: dict[str, str]) -> None:
    """Give a forked role its own environment and randomness (`random` and OpenSSL see to their own)."""
    os.environ.update(own)
    _show(own)
    os.environ.pop(ROOM, None)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()


def _show(own: dict[str, str]) -> None:
    """Let `ps e` and /proc/PID/environ, which show a process's first environment, tell one role from another."""
    with suppress(OSError, IndexError, ValueError):
        first = Path("/proc/self/environ").read_bytes()
        at, room = first.index(f"{ROOM}=".encode()), len(f"{ROOM}={os.environ.get(ROOM, '')}")
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, text = int(fields[47]), "\0".join(f"{name}={value}" for name, value in own.items()).encode()
        if start:
            ctypes.memmove(start + at, text[:room].ljust(room, b"\0"), room)


def _leave(code: object) -> NoReturn:
    """End a forked role as Python would, but without taking every module apart.

    That writes to all objects, so each role would copy, in its last moment, all that it shared with the others.
    """
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # joins what is no daemon
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def _ended(pids: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Process id and exit code (or minus the signal, as `subprocess` has it) of each that has ended."""
    for pid in list(pids):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            yield pid, os.waitstatus_to_exitcode(status)


def _end(pids: dict[int, int]) -> None:
    """The launcher has ended those whom it knew in order; nobody is left to tell any other to."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _tell(line: socket.socket, **what: int) -> None:
    line.sendall(json.dumps(what).encode() + b"\n")
