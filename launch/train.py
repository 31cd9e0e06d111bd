"""One rank of a run, under torchrun, srun or mpirun: a trunk rank or a client, as its rank says."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from dataclasses import replace

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hpc import logs
from hpc.cli import make_parser, parse, run_main, to_yaml
from hpc.config import Config
from hpc.errors import BadInput, HpcError, Paused
from hpc.imports import importing
from hpc.last_words import RoleFailed, leave_last_words
from hpc.launcher import BASELINE
from hpc.link.meeting_file import leave_meetings
from hpc.preflight import check, check_data, check_meeting_point
from hpc.stopping import listen
from hpc.topology import Place, World, place, read_world

LET_LOG_WRITE_S = 0.2
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
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what goes wrong is said once, and not in stack frames
    try:
        check_meeting_point(where.world, config)
        check(config, coordinates=where.name in ("trunk-0", "centralised"))
        if where.role == "client":
            check_data(config, [where.index])
        with importing():
            from hpc.federation import run_role

        def end(why: str, code: int) -> None:
            error = Paused(why) if code == Paused.exit_code else RoleFailed(why, code)
            # In a thread: where a disc is stalled, the log may never take another line.
            threading.Thread(target=logs.ended_badly, args=(error,), daemon=True).start()
            tell(where.name, error)
            leave_meetings()
            time.sleep(LET_LOG_WRITE_S)
            os._exit(code)

        stop = None if where.role == "baseline" else listen(grace_s=config.run.grace_s, end=end)
        run_role(config, where, yaml, stop=stop)
    except Exception as error:
        logs.ended_badly(error)
        if not isinstance(error, HpcError):
            traceback.print_exc()
        return tell(where.name, error)
    finally:
        leave_meetings()
    return 0


def tell(role: str, error: Exception) -> int:
    """Say why this role ends, to the launcher or on the terminal; returns its exit code."""
    code = error.exit_code if isinstance(error, HpcError) else 1
    if not leave_last_words(role, logs.reason(error), code):
        logs.print_ending(role, error)
    return code


if __name__ == "__main__":
    run_main(main, ending="run ended")
