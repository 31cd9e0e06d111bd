"""What a Slurm job has: its hosts, their addresses, tasks, CPUs and GPUs. Asks `scontrol`; imports no torch."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Callable, Mapping

from hpc.errors import TopologyError
from hpc.hostlist import host_names, repeated
from hpc.placement import Host

Ask = Callable[..., str]
ANSWER_S = 60.0  # a busy controller takes its time


def scontrol(*arguments: str) -> str:
    """What `scontrol arguments` prints. Raises `TopologyError` with its complaint."""
    try:
        done = subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=ANSWER_S, check=False, env=os.environ
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TopologyError(
            f"scontrol {' '.join(arguments)} gave no answer ({error}); is Slurm's bin in PATH?"
        ) from None
    if done.returncode:
        raise TopologyError(f"scontrol {' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def require_job(environ: Mapping[str, str]) -> None:
    """Raise `TopologyError` unless these are the variables of a job's batch script."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_JOB_CPUS_PER_NODE"):
        if name not in environ and f"{name}_HET_GROUP_0" not in environ:
            raise TopologyError(
                f"{name} is not set, so this is no Slurm job; submit it with `sbatch slurm/train.sh`, or run on this "
                "machine with `python launch/local.py`"
            )


def hosts_of_job(environ: Mapping[str, str], ask: Ask = scontrol) -> list[Host]:
    """The hosts of this job in Slurm's order; those of a heterogeneous job component by component."""
    gpus = gpus_of_job(ask("show", "job", "--details", "--oneliner", environ["SLURM_JOB_ID"]))
    hosts: list[Host] = []
    for group in components(environ):
        nodes = _of_group(environ, "SLURM_JOB_NODELIST", group)
        names = ask("show", "hostnames", nodes).split()
        addresses = addresses_of(ask("show", "node", "--oneliner", nodes))
        tasks = repeated(_of_group(environ, "SLURM_TASKS_PER_NODE", group))
        cpus = repeated(_of_group(environ, "SLURM_JOB_CPUS_PER_NODE", group))
        for name, own_tasks, own_cpus in zip(names, tasks, cpus, strict=True):
            hosts.append(
                Host(
                    name=name,
                    address=reachable(name, addresses.get(name, name)),
                    tasks=own_tasks,
                    cpus=own_cpus,
                    gpus=gpus.get(name, 0),
                    het_group=group,
                )
            )
    return hosts


def components(environ: Mapping[str, str]) -> list[int | None]:
    """Numbers of the components of a heterogeneous job; of any other the one that has no number."""
    size = environ.get("SLURM_HET_SIZE")
    return [None] if size is None else list(range(int(size)))


def _of_group(environ: Mapping[str, str], name: str, group: int | None) -> str:
    return environ[name if group is None else f"{name}_HET_GROUP_{group}"]


def addresses_of(nodes: str) -> dict[str, str]:
    """Node name → address, from `scontrol show node --oneliner`."""
    return dict(re.findall(r"NodeName=(\S+).*? NodeAddr=(\S+)", nodes))


def gpus_of_job(job: str) -> dict[str, int]:
    """Host → GPUs granted there, from `scontrol show job --details --oneliner`."""
    found: dict[str, int] = {}
    for nodes, gres in re.findall(r" Nodes=(\S+) CPU_IDs=\S* Mem=\S* GRES=(\S*)", job):
        count = sum(int(number) for number in re.findall(r"\bgpu(?::[^:,(]+)?:(\d+)", gres))
        found |= dict.fromkeys(host_names(nodes), count)
    return found


def reachable(name: str, address: str) -> str:
    """The host's name where it resolves (a name may mean several networks), else the address that Slurm uses."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        return address
    return name


def meeting_host(name: str, environ: Mapping[str, str], ask: Ask = scontrol) -> str:
    """Where the tasks of one `srun` meet: its first host, by name, by Slurm's address, or else where srun runs."""
    try:
        return reachable(name, addresses_of(ask("show", "node", "--oneliner", name)).get(name, name))
    except TopologyError:
        return reachable(name, environ.get("SLURM_LAUNCH_NODE_IPADDR", name))
