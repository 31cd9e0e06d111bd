"""A whole federation from one command: on this machine, or as the rank that a launcher made of this process.

`python launch/local.py` and `torchrun launch/local.py` start the trunk and the clients themselves;
`torchrun --nproc-per-node N launch/local.py` gives each of its N processes one role.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import make_parser, parse, run_main
from hpc.config import Config
from hpc.errors import BadInput, ConfigError
from hpc.launcher import launch
from hpc.topology import read_world


def main(argv: list[str]) -> int:
    world = read_world(os.environ)
    if world.world_size > 1:
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world.world_size):  # torchrun, all on this machine
            with contextlib.suppress(BadInput):  # every rank parses again, and rank 0 reports
                make_missing_keys(parse(make_parser(str(__doc__)), argv)[0])
        return one_rank(argv)
    config, _ = parse(make_parser(str(__doc__)), argv)
    if config.world_size == 1:
        return one_rank(argv)
    if config.run.outside_clients:
        raise ConfigError(
            f"--run.outside_clients {config.run.outside_clients}: this command starts all roles on this machine, where "
            "nobody else can reach them; start launch/train.py (see launch/join.py --help)"
        )
    from hpc.preflight import check, check_data

    check(config)
    check_data(config, range(config.train.clients))
    make_missing_keys(config)
    launch(config, Path(__file__).with_name("train.py"), argv)
    return 0


def one_rank(argv: list[str]) -> int:
    import train

    return train.main(argv)


def make_missing_keys(config: Config) -> None:
    """On one machine all parties are one person, who should not need a second command; nothing is overwritten."""
    from hpc.link.identity import ensure_local

    ensure_local(Path(config.link.keys_dir), config.train.clients)


if __name__ == "__main__":
    run_main(main, ending="run ended")
