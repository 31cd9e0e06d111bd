"""Which role runs on which host: trunk ranks where the GPUs are, each client on a task of its own. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpc.config import Config
from hpc.errors import TopologyError

MIB = 2**20


@dataclass(kw_only=True, frozen=True)
class Host:
    """What a job has of one machine."""

    name: str
    address: str
    """Where other hosts reach it."""
    tasks: int
    cpus: int
    gpus: int = 0
    het_group: int | None = None
    """Component of a heterogeneous job."""


@dataclass(kw_only=True, frozen=True)
class Seat:
    """One role's place."""

    rank: int
    """Global rank."""
    role: str
    host: Host
    local_rank: int
    gpu: int | None
    """Which of the host's GPUs in this job; none: the CPU."""
    threads: int

    @property
    def device(self) -> str:
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"


def role_names(config: Config) -> list[str]:
    """Of all global ranks: first the trunk's."""
    if config.train.schedule == "centralised":
        return ["centralised"]
    trunk = [f"trunk-{rank}" for rank in range(config.trunk.ranks)]
    return trunk + [f"client-{client}" for client in range(config.train.clients)]


def place_roles(hosts: Sequence[Host], config: Config) -> list[Seat]:
    """A seat for each role in the order of the global ranks.

    Trunk ranks take the hosts with the most free GPUs first, one GPU each; clients take what is left in the order of
    the hosts. Raises `TopologyError` unless there is one task for each role.
    """
    check_tasks(sum(host.tasks for host in hosts), config)
    free = {host.name: host.tasks for host in hosts}
    gpus = {host.name: 0 if config.run.device == "cpu" else host.gpus for host in hosts}
    seats = []
    for rank, role in enumerate(role_names(config)):
        open_hosts = [host for host in hosts if free[host.name]]
        # `max` keeps the first of equals, so without GPUs the hosts fill up in their order.
        host = open_hosts[0] if role.startswith("client") else max(open_hosts, key=lambda each: gpus[each.name])
        gpu = host.gpus - gpus[host.name] if gpus[host.name] else None
        seats.append(
            Seat(
                rank=rank,
                role=role,
                host=host,
                local_rank=host.tasks - free[host.name],
                gpu=gpu,
                threads=config.run.threads or max(1, host.cpus // host.tasks),
            )
        )
        free[host.name] -= 1
        gpus[host.name] -= gpu is not None
    return seats


def seats_in_order(hosts: Sequence[Host], config: Config) -> list[Seat]:
    """Where a launcher that knows no roles has put the ranks: host by host, sharing the GPUs of each in turn."""
    places = [(host, local) for host in hosts for local in range(host.tasks)]
    return [
        Seat(
            rank=rank,
            role=role,
            host=host,
            local_rank=local,
            gpu=local % host.gpus if host.gpus and config.run.device != "cpu" else None,
            threads=config.run.threads or max(1, host.cpus // host.tasks),
        )
        for rank, (role, (host, local)) in enumerate(zip(role_names(config), places, strict=True))
    ]


def check_tasks(tasks: int, config: Config) -> None:
    """Raise `TopologyError` with both numbers and the flags unless the job has one task for each role."""
    roles = role_names(config)
    if tasks == len(roles):
        return
    asks = (
        "--train.schedule centralised has one role"
        if len(roles) == 1
        else f"--trunk.ranks {config.trunk.ranks} and --train.clients {config.train.clients} make {len(roles)} roles"
    )
    raise TopologyError(
        f"the job has {tasks} tasks, but {asks}; submit it with sbatch --ntasks={len(roles)}, or change these flags"
    )


def as_table(seats: Sequence[Seat], memory: Mapping[str, int]) -> str:
    """The placement for people. `memory`: bytes of a role's parts, by the kind of role (`trunk`, `client`...)."""
    heading = ("rank", "host", "role", "device", "threads", "memory MiB")
    rows = [
        (
            str(seat.rank),
            seat.host.name,
            seat.role,
            seat.device,
            str(seat.threads),
            f"{memory[seat.role.partition('-')[0]] / MIB:.1f}",
        )
        for seat in seats
    ]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in [heading, *rows]
    )
