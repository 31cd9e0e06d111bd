"""A whole federation inside a Slurm job: the batch step runs this, and it starts one `srun` step for each role.

`sbatch slurm/train.sh [flags]` is how to get here. With --dry_run it shows who would run where, and starts nothing.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import make_parser, parse, run_main
from hpc.config import Config
from hpc.errors import TopologyError
from hpc.placement import place_roles
from hpc.preflight import check
from hpc.slurm_hosts import hosts_of_job, require_job
from hpc.slurm_job import SlurmJob, say
from hpc.slurm_steps import resume_flags, run_name


def main(argv: list[str]) -> int:
    parser = make_parser(str(__doc__))
    require_job(os.environ)
    if "--dry_run" in argv:
        import train

        return train.main(argv)
    config, _ = parse(parser, argv)
    if config.link.transport == "mpi":
        raise TopologyError(
            "--link.transport mpi needs all roles in one MPI job, and slurm/train.sh starts a step for each; use gloo, "
            "or srun --mpi=pmix or mpirun in a batch script of your own"
        )
    seats = place_roles(hosts_of_job(os.environ), config)
    named = run_name(config, os.environ["SLURM_JOB_ID"])
    config, _ = parse(parser, [*argv, *named])
    added = [*named, *flags_to_resume(config, named_after_job=bool(named))]
    config, _ = parse(parser, [*argv, *added])
    check(config)
    make_keys_if_none(config)
    return SlurmJob(config, seats, [sys.executable, str(Path(__file__).with_name("train.py")), *argv, *added]).run()


def flags_to_resume(config: Config, *, named_after_job: bool) -> list[str]:
    """What a requeued job adds to its flags; says so."""
    folder = Path(str(config.run.folder))
    committed: list[int] = []
    if any(folder.glob("checkpoint-*/manifest.json")):
        from hpc.resume import committed_steps  # brings torch

        committed = committed_steps(folder)
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
    flags = resume_flags(config, named_after_job=named_after_job, restarts=restarts, committed=committed)
    if restarts:
        say(f"restart {restarts}; {' '.join(flags) or 'there is no checkpoint, so the run begins again'}")
    return flags


def make_keys_if_none(config: Config) -> None:
    """A first job must not fail for want of keys; where there is any key, none is made."""
    folder = Path(config.link.keys_dir)
    if config.world_size == 1 or any(folder.rglob("*.key")) or any(folder.rglob("*.pem")):
        return
    from hpc.link.identity import ensure_local

    ensure_local(folder, config.train.clients)
    say(
        f"--link.keys_dir {folder} held no keys: NEW IDENTITIES of the server and of all clients were made there, so "
        "whoever reads that folder can be any of them; parties that do not trust each other make their own"
    )


if __name__ == "__main__":
    run_main(main)
