"""One rank of a run, under torchrun, srun or mpirun: a trunk rank or a client, as its rank says."""

from __future__ import annotations

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from hpc.cli import make_parser, parse, run_main, to_yaml
from hpc.config import Config
from hpc.errors import BadInput, HpcError
from hpc.launcher import BASELINE, leave_last_words
from hpc.link.meeting_file import leave_meetings
from hpc.preflight import check, check_data
from hpc.topology import Place, place, read_world

LET_RANK_0_SPEAK_S = 5.0  # torchrun ends all ranks as soon as one has ended


def main(argv: list[str]) -> int:
    parser = make_parser(str(__doc__))
    world = read_world(os.environ)
    try:
        config, namespace = parse(parser, argv)
        baseline = os.environ.get(BASELINE) == "me"
        where = Place(role="baseline", index=0, world=world) if baseline else place(world, config)
    except BadInput as error:
        # Every rank was given the same flags; one of them reports the mistake.
        if world.global_rank == 0:
            raise
        time.sleep(LET_RANK_0_SPEAK_S)
        return error.exit_code
    return run_rank(config, where, to_yaml(parser, namespace))


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

        run_role(config, where, yaml)
    except HpcError as error:
        if not leave_last_words(where.name, str(error), error.exit_code):
            sys.stderr.write(f"{where.name}: error: {error}\n")
        return error.exit_code
    finally:
        leave_meetings()
    return 0


if __name__ == "__main__":
    run_main(main)
