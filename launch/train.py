"""One rank of a run, under torchrun, srun or mpirun: a trunk rank or a client, as its rank says."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hpc.cli import make_parser, parse, run_main, to_yaml
from hpc.config import Config
from hpc.errors import BadInput, HpcError, Paused
from hpc.launcher import BASELINE, leave_last_words
from hpc.preflight import check, check_data
from hpc.stopping import listen
from hpc.topology import Place, World, place, read_world

LET_RANK_0_SPEAK_S = 5.0  # torchrun ends all ranks as soon as one has ended


def main(argv: list[str]) -> int:
    parser = make_parser(str(__doc__))
    parser.add_argument("--dry_run", action="store_true", help="Show who would run where; start and write nothing.")
    world = at_meeting_point(read_world(os.environ))
    try:
        config, namespace = parse(parser, argv)
        if namespace.pop("dry_run"):
            return dry_run(config, world)
        baseline = os.environ.get(BASELINE) == "me"
        where = Place(role="baseline", index=0, world=world) if baseline else place(world, config)
    except BadInput as error:
        # Every rank was given the same flags; one of them reports the mistake.
        if world.global_rank == 0:
            raise
        time.sleep(LET_RANK_0_SPEAK_S)
        return error.exit_code
    return run_rank(config, where, to_yaml(parser, namespace))


def at_meeting_point(world: World) -> World:
    """Under plain srun, with an address of the first host that this one can reach."""
    if world.launcher != "slurm" or world.world_size == 1 or "MASTER_ADDR" in os.environ:
        return world
    from hpc.slurm_hosts import meeting_host

    return replace(world, master_addr=meeting_host(world.master_addr, os.environ))


def dry_run(config: Config, world: World) -> int:
    """One rank speaks for all."""
    if world.global_rank == 0:
        from hpc.dry_run import render

        print(render(config, world, os.environ))
    return 0


def run_rank(config: Config, where: Place, yaml: str) -> int:
    """Run this rank's role; its last words go to the launcher if there is one, else to the terminal."""
    # Before torch is loaded: OpenMP reads it once. Idle ranks sleep instead of burning a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        check(config, coordinates=where.name in ("trunk-0", "centralised"))
        if where.role == "client":
            check_data(config, [where.index])
        from hpc.federation import run_role

        def end(why: str, code: int) -> None:
            report(where, why, code)
            os._exit(code)

        stop = None if where.role == "baseline" else listen(grace_s=config.run.grace_s, end=end)
        run_role(config, where, yaml, stop=stop)
    except HpcError as error:
        report(where, str(error), error.exit_code)
        return error.exit_code
    return 0


def report(where: Place, why: str, code: int) -> None:
    """Why this role ends: to the launcher, or to the terminal."""
    if not leave_last_words(where.name, why, code):
        kind = "" if code == Paused.exit_code else "error: "
        sys.stderr.write(f"{where.name}: {kind}{why}\n")


if __name__ == "__main__":
    run_main(main)
