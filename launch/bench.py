"""Benchmarks: `python launch/bench.py SUITE` measures; `python launch/bench.py render` makes tables and figures again.

Every further flag is a run's (`--config FILE.yaml`, `--train.per_client_batch_size 8`); each run of the suite gets it.
Writes results/raw/bench-SUITE.json, results/tables/bench-SUITE.md and results/figures/bench-SUITE.png.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.bench.results import RESULTS, provenance, render, save
from hpc.bench.suite import SUITES, Options, load_suite
from hpc.cli import make_parser, parse, run_main
from hpc.errors import ConfigError


def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the roles of a run have it (hpc.launcher)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no run outlives the command
    own, flags = own_parser().parse_known_args(argv)
    if own.suite != "render":
        options = options_of(own, flags)
        measured = load_suite(own.suite).measure(options)
        print(save(RESULTS, own.suite, measured, provenance(options.config, argv)))
    for path in render(RESULTS):
        print(path)
        if path.suffix == ".md" and own.suite in path.stem:
            print(path.read_text())
    return 0


def own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("suite", choices=[*SUITES, "render"], help="What to measure, or `render`.")
    parser.add_argument("--turns", type=int, default=6, help="Turns that count, after 2 to warm up (default 6).")
    parser.add_argument("--rings", type=int, choices=(1, 2), default=1, help="2: half the memory, twice the time.")
    parser.add_argument("--clients", type=int, default=4, help="Clients of each federation (default 4).")
    return parser


def options_of(own: argparse.Namespace, flags: list[str]) -> Options:
    """Raises `ConfigError` for a flag that no run knows, before anything is started."""
    if own.turns < 1:
        raise ConfigError(f"--turns is {own.turns}; it must be at least 1")
    if not any(flag == "--config" or flag.startswith("--config=") for flag in flags):
        flags = ["--config", str(Path(__file__).with_name("recipes") / "demo.yaml"), *flags]
    flags = [*flags, "--train.clients", str(own.clients)]
    return Options(
        config=parse(make_parser(str(__doc__)), flags)[0],
        flags=tuple(flags),
        local=Path(__file__).with_name("local.py"),
        folder=RESULTS / "runs" / f"bench-{time.strftime('%Y%m%d-%H%M%S')}-{own.suite}",
        turns=own.turns,
        rings=own.rings,
    )


if __name__ == "__main__":
    run_main(main)
