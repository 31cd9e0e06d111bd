"""The command line and the variables of one role's `srun` step, and what a restarted job adds to the flags. Pure.

A step for each role, not one for all: Slurm ends all tasks of a step together, and a client may die alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hpc.config import Config
from hpc.placement import Seat

# What sbatch was asked for the whole job, srun would take for each step.
OF_THE_JOB = (
    "SLURM_CPUS_PER_TASK",
    "SLURM_TRES_PER_TASK",
    "SLURM_DISTRIBUTION",
    "SLURM_EXCLUSIVE",
    "SLURM_GPU",
    "SLURM_GRES",
    "SLURM_HINT",
    "SLURM_MEM_PER",
    "SLURM_NNODES",
    "SLURM_NPROCS",
    "SLURM_NTASKS",
    "SLURM_OVERLAP",
    "SLURM_EXPORT_ENV",
)


def step_command(seat: Seat, *, job_has_gpus: bool) -> list[str]:
    """`srun` for one role: on its host, with its share of the CPUs, and with a GPU of its own if it has one.

    `--mem=0` lets steps of one host share the job's memory there.
    """
    gpus = [] if not job_has_gpus else ["--gres=gpu:1" if seat.gpu is not None else "--gres=none"]
    group = [] if seat.host.het_group is None else [f"--het-group={seat.host.het_group}"]
    return [
        "srun",
        *group,
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={seat.host.name}",
        f"--cpus-per-task={max(1, seat.host.cpus // seat.host.tasks)}",
        "--exact",
        "--mem=0",
        *gpus,
        "--kill-on-bad-exit=0",
        "--mpi=none",
        "--export=ALL",
        "--quiet",
        f"--job-name={seat.role}",
    ]


def step_environment(environ: Mapping[str, str], seat: Seat, *, roles: int, address: str, port: int) -> dict[str, str]:
    """What a role reads (`hpc.topology`): its rank of how many, and where they meet."""
    kept = {name: value for name, value in environ.items() if not name.startswith(OF_THE_JOB)}
    return kept | {
        "RANK": str(seat.rank),
        "WORLD_SIZE": str(roles),
        # With a GPU of its own a step sees only that one.
        "LOCAL_RANK": "0" if seat.gpu is not None else str(seat.local_rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def run_name(config: Config, job_id: str) -> list[str]:
    """The flags that name a run without a name after its job: a requeued job has the same number, so it finds it."""
    return [] if config.run.folder else ["--run.name", f"slurm-{job_id}"]


def resume_flags(config: Config, *, named_after_job: bool, restarts: int, committed: Sequence[int]) -> list[str]:
    """The flags with which a requeued job goes on; none if it has no checkpoint, or the user said where to begin.

    A folder that is named after the job can only hold that job's checkpoints. In a folder that the user named, those
    of another run may lie; only a restarted job takes them for its own, as it was refused otherwise.
    """
    if config.run.resume_from_checkpoint is not None or not committed or not (named_after_job or restarts):
        return []
    return ["--run.resume_from_checkpoint", "latest"]
