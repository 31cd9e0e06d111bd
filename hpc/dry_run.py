"""`--dry_run`: who would run where and how much memory it would take. Starts nothing and writes nothing."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import replace

from hpc.config import Config
from hpc.hostlist import host_names, repeated
from hpc.launcher import THREADS, cpu_share
from hpc.placement import Host, Seat, as_table, place_roles, seats_in_order
from hpc.preflight import check
from hpc.slurm_hosts import hosts_of_job
from hpc.topology import World, check_world

LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")


def render(config: Config, world: World, environ: Mapping[str, str]) -> str:
    """The placement as a table. Raises a `BadInput` error for what would refuse the run itself."""
    check(config)
    seats = planned_seats(config, world, environ)
    from hpc.model.estimate import CONTENTS, role_bytes

    return f"{as_table(seats, role_bytes(config))}\n{CONTENTS}\nDry run: nothing was started."


def planned_seats(config: Config, world: World, environ: Mapping[str, str]) -> list[Seat]:
    """As the launcher has placed the ranks; where there is none, as a Slurm job or this machine would."""
    if world.world_size > 1:
        check_world(world.world_size, config)
        return seats_in_order(_hosts_of_ranks(world, environ, _gpus()), config)
    if "SLURM_JOB_ID" in environ and world.launcher == "none":
        return place_roles(hosts_of_job(environ), config)
    cores = len(os.sched_getaffinity(0))
    here = Host(name=socket.gethostname(), address="127.0.0.1", tasks=config.world_size, cpus=cores, gpus=_gpus())
    return [
        replace(seat, threads=config.run.threads or int(cpu_share(config, seat.rank)[THREADS]))
        for seat in seats_in_order([here], config)
    ]


def _hosts_of_ranks(world: World, environ: Mapping[str, str], gpus: int) -> list[Host]:
    """torchrun and mpirun do not tell a rank the other hosts' names; srun does."""
    if world.launcher == "slurm":
        tasks = repeated(environ["SLURM_STEP_TASKS_PER_NODE"])
        names = host_names(environ["SLURM_STEP_NODELIST"])
    else:
        local = next((int(environ[name]) for name in LOCAL_SIZES if name in environ), world.world_size)
        tasks = [min(local, world.world_size - first) for first in range(0, world.world_size, local)]
        names = [socket.gethostname(), *(f"host {number}" for number in range(1, len(tasks)))]
    cores = len(os.sched_getaffinity(0))
    return [
        Host(name=name, address=name, tasks=count, cpus=cores, gpus=gpus)
        for name, count in zip(names, tasks, strict=True)
    ]


def _gpus() -> int:
    """Those of this machine; other hosts are taken to be alike."""
    import torch

    return torch.cuda.device_count()
