"""See whether this machine is ready for a run: what is there, what is wrong, and how to mend it.

Exit code 0: ready; 1: something that this configuration needs is broken; 2: a wrong flag.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import make_parser, parse, run_main
from hpc.errors import ConfigError


def main(argv: list[str]) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = make_parser(str(__doc__))
    parser.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    parser.add_argument("--host", type=str, help="Try to reach this machine, such as trunk rank 0's, ...")
    parser.add_argument("--port", type=int, help="... at this port.")
    parser.add_argument("--only", nargs="+", type=str, metavar="CHECK", help="Only these checks.")
    config, own = parse(parser, argv)
    from hpc.doctor.finding import Asked
    from hpc.doctor.visit import CHECKS, broken, print_table, to_json, visit

    if unknown := [name for name in own["only"] or [] if name not in CHECKS]:
        raise ConfigError(f"--only {unknown[0]} is no check; the checks are {', '.join(CHECKS)}")
    if own["port"] is not None and not 0 < own["port"] < 65536:
        raise ConfigError(f"--port is {own['port']}; it must be 1 to 65535")
    found = visit(Asked(config=config, host=own["host"], port=own["port"]), own["only"])
    if own["json"]:
        print(to_json(found))
    else:
        print_table(found)
    return 1 if broken(found) else 0


if __name__ == "__main__":
    run_main(main)
