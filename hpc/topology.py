"""Where am I: the launcher's variables → role, trunk rank or client id. Pure.

Global ranks 0 … trunk.ranks-1 are the trunk; the others are clients 0, 1, … in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hpc.config import Config
from hpc.errors import TopologyError
from hpc.hostlist import first_host

Launcher = Literal["env", "mpi", "slurm", "none"]
DEFAULT_PORT = 29477


@dataclass(kw_only=True, frozen=True)
class World:
    """What the launcher said: which of how many processes this is, and where they meet."""

    launcher: Launcher
    global_rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    agent_hosts_store: bool = False


@dataclass(kw_only=True, frozen=True)
class Place:
    """This process's role. `index` is the trunk rank or the client id."""

    role: Literal["trunk", "client", "centralised", "baseline"]
    index: int
    world: World

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}" if self.role in ("trunk", "client") else self.role


def read_world(environ: Mapping[str, str]) -> World:
    """The launcher's variables: torchrun's (or our own), then MPI's, then Slurm's; none means one process.

    Raises `TopologyError` for a variable that is missing beside others, or that is no number, port or host name.
    """
    if "RANK" in environ and "WORLD_SIZE" not in environ:
        raise TopologyError("RANK is set and WORLD_SIZE is not; set both (torchrun does), or neither")
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return World(
            launcher="env",
            global_rank=_number(environ, "RANK"),
            world_size=_number(environ, "WORLD_SIZE"),
            local_rank=_number(environ, "LOCAL_RANK", 0),
            master_addr=_address(environ, "127.0.0.1"),
            master_port=_port(environ, DEFAULT_PORT),
            agent_hosts_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    mpi = [("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")]
    if not _is_slurm_task(environ):
        mpi += [("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")]
    for rank_name, size_name, local in mpi:
        if rank_name in environ and size_name in environ:
            rank, size = _number(environ, rank_name), _number(environ, size_name)
            return _meeting_later(environ, "mpi", rank, size, local)
    if _is_slurm_task(environ):
        rank = _number(environ, "PMIX_RANK" if "PMIX_RANK" in environ else "SLURM_PROCID")
        size = _number(environ, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS")
        return _meeting_later(environ, "slurm", rank, size, "SLURM_LOCALID")
    return World(
        launcher="none",
        global_rank=0,
        world_size=1,
        local_rank=0,
        master_addr=_address(environ, "127.0.0.1"),
        master_port=_port(environ, DEFAULT_PORT),
    )


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, with PMI, PMIx or without.

    A batch script has SLURM_PROCID=0 and the job's SLURM_NTASKS too, but it is no step. A process that MPICH's mpirun
    started through srun has a local rank from it, and srun's own PMI gives none.
    """
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and "MPI_LOCALRANKID" not in environ


def _meeting_later(environ: Mapping[str, str], launcher: Launcher, rank: int, size: int, local: str) -> World:
    """MPI and Slurm name no meeting point: Slurm's first host and a port made from the job's number."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    port = port_of_job(_number(environ, "SLURM_JOB_ID", 0))
    return World(
        launcher=launcher,
        global_rank=rank,
        world_size=size,
        local_rank=_number(environ, local, 0),
        master_addr=_address(environ, first_host(nodes)),
        master_port=_port(environ, port),
    )


def _address(environ: Mapping[str, str], default: str) -> str:
    """`MASTER_ADDR`. Nobody's resolver finds what is no host name, however long one waits."""
    address = environ.get("MASTER_ADDR") or default
    if re.fullmatch(r"[\w.-]+|[0-9A-Fa-f:.]*::?[0-9A-Fa-f:.%\w]+", address, re.ASCII) is None:
        raise TopologyError(
            f"MASTER_ADDR is {address!r}; it must be one host's name or address, in ASCII letters, and its port goes "
            "into MASTER_PORT"
        )
    return address


def _port(environ: Mapping[str, str], default: int) -> int:
    port = _number(environ, "MASTER_PORT", default)
    if not 0 < port < 65536:
        raise TopologyError(f"MASTER_PORT is {port}; it must be 1 to 65535")
    return port


def port_of_job(job_id: int) -> int:
    """Where the roles of a Slurm job meet: jobs that share a host get ports of their own."""
    return DEFAULT_PORT + job_id % 10_000


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(str(text))
    except ValueError:
        raise TopologyError(f"{name} is {text!r}; the launcher must set it to a number") from None


def place(world: World, config: Config) -> Place:
    """The role of this process. Raises `TopologyError` if the world does not fit the configuration."""
    check_world(world.world_size, config)
    if not 0 <= world.global_rank < world.world_size:
        raise TopologyError(f"rank {world.global_rank} of {world.world_size} processes; ranks count from 0")
    if config.train.schedule == "centralised":
        return Place(role="centralised", index=0, world=world)
    if world.global_rank < config.trunk.ranks:
        return Place(role="trunk", index=world.global_rank, world=world)
    return Place(role="client", index=world.global_rank - config.trunk.ranks, world=world)


def check_world(processes: int, config: Config) -> None:
    """Raise `TopologyError` with the numbers and the flags unless there is one process for each role."""
    outside = config.run.outside_clients
    if processes == config.world_size - outside:
        return
    if config.train.schedule == "centralised":
        raise TopologyError(f"{processes} processes were started; --train.schedule centralised runs in 1 process")
    if outside:
        raise TopologyError(
            f"{processes} processes were started; --trunk.ranks {config.trunk.ranks} and --train.clients "
            f"{config.train.clients} without --run.outside_clients {outside} need {config.world_size - outside}"
        )
    few = "few" if processes < config.world_size else "many"
    raise TopologyError(
        f"{processes} processes are too {few}: --trunk.ranks {config.trunk.ranks} and --train.clients "
        f"{config.train.clients} need {config.world_size}; start {config.world_size} processes, or change these flags"
    )


def clients_of_trunk_rank(trunk_rank: int, config: Config) -> list[int]:
    """Client k belongs to trunk rank k modulo trunk.ranks."""
    return [c for c in range(config.train.clients) if c % config.trunk.ranks == trunk_rank]
