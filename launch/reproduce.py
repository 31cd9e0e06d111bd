"""The paper's tables, each by one command: run what is not done yet, then write table and figures into results/.

`python launch/reproduce.py table1 --preset small --data_dir DATA` runs; `... all --preset paper --dry_run` lists what
would be run; `... tune` tries learning rates; `... render` makes all tables and figures again from results/raw;
`... score RUN_FOLDER` prints the metrics of any run that had --data.save_predictions true.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import run_main
from hpc.errors import ConfigError
from hpc.reproduce.every_cell import every_table, table_cells
from hpc.reproduce.plan import jobs_of, tuning_jobs
from hpc.reproduce.preset import Preset, load_preset

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("table1", "table2", "table3", "table4", "table5")
PRESETS = Path(__file__).with_name("presets")


def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # no run outlives the command
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    own = checked(own_parser().parse_args(argv))
    if own.what == "score":
        from hpc.reproduce.score_command import scores_of

        print(scores_of(Path(own.run)))
        return 0
    results = Path(own.results_dir)
    preset = load_preset(own.preset, PRESETS)
    from hpc.bench.results import render as render_measured
    from hpc.reproduce.render import render, render_preset

    if own.what == "render":
        for path in [*render(results, PRESETS, others=[preset]), *render_measured(results), *quoted(results)]:
            print(path)
        return 0
    if own.what == "efficiency":
        return efficiency(own, preset, argv)
    tables = every_table(preset) if own.what == "all" else [own.what]
    cells = [] if own.what == "tune" else table_cells(preset, tables, own.tasks, own.seeds)
    jobs = tuning_jobs(preset, own.tasks) if own.what == "tune" else jobs_of(cells)
    from hpc.reproduce.run import Bench

    bench = Bench(
        root=ROOT, results=results.resolve(), data_dir=Path(own.data_dir).resolve(), preset=preset, at_once=own.jobs
    )
    measures = own.what == "all" and preset.efficiency is not None and not own.tasks and not own.seeds
    if measures:
        check_efficiency(own, preset)
    if own.dry_run:
        from hpc.reproduce.dry_run import planned_runs, report

        print(report(preset, planned_runs(preset, jobs, cells, bench.is_done)))
    else:
        bench.run_all(jobs)
        show(render_preset(results, preset), preset, ["tuning"] if own.what == "tune" else tables)
    return efficiency(own, preset, argv) if measures else 0


def quoted(results: Path) -> list[Path]:
    """The repository's page that quotes table 3 of the small preset, written again from its runs."""
    from hpc.reproduce.attack_rows import attacked_rows
    from hpc.reproduce.measured_docs import PRESET, fill_in, texts_of
    from hpc.reproduce.render import runs_of

    if results.resolve() != ROOT / "results":
        return []
    preset = load_preset(PRESET, PRESETS)
    rows = attacked_rows(preset, runs_of(results, preset, say=lambda line: None))
    path = fill_in(ROOT, texts_of(results, rows))
    return [path] if path else []


def check_efficiency(own: argparse.Namespace, preset: Preset) -> None:
    """Raises a `BadInput` error, before any run, for what would end the measurement after all of them."""
    from hpc.reproduce.efficiency import options_of

    options_of(preset, root=ROOT, results=Path(own.results_dir).resolve(), data_dir=Path(own.data_dir).resolve())


def efficiency(own: argparse.Namespace, preset: Preset, argv: list[str]) -> int:
    """Typed by itself, it measures again; as a part of `all`, only what has not been measured."""
    from hpc.reproduce.efficiency import efficiency_path, list_efficiency, measure_efficiency

    results, data_dir = Path(own.results_dir).resolve(), Path(own.data_dir).resolve()
    check_efficiency(own, preset)
    if own.dry_run:
        list_efficiency(preset)
    elif own.what == "efficiency" or not efficiency_path(results, preset).exists():
        for path in measure_efficiency(preset, root=ROOT, results=results, data_dir=data_dir, arguments=argv):
            print(path)
    return 0


def show(written: list[Path], preset: Preset, asked: list[str]) -> None:
    """What was written, and the pages that were asked for."""
    pages = {f"{name}-{preset.name}.md" for name in asked}
    for path in written:
        print(path)
    for path in written:
        if path.name in pages:
            print(f"\n{path.read_text(encoding='utf-8')}", end="")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists what there is")


def own_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "what", choices=[*TABLES, "efficiency", "tune", "all", "render", "score"], help="A table, or what to do."
    )
    parser.add_argument("run", nargs="?", help="score: the folder of the run.")
    parser.add_argument("--preset", default="small", help="paper, small (default), smoke, or a YAML file like those.")
    parser.add_argument("--data_dir", default="data", help="Folder with the data sets (docs/data.md); default: data.")
    parser.add_argument("--results_dir", default="results", help="Where results are written; default: results.")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="Only these of the table's tasks.")
    parser.add_argument("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="These, not the preset's.")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="Runs at the same time; default: 1.")
    parser.add_argument("--dry_run", action="store_true", help="List the runs, and start none.")
    return parser


def checked(own: argparse.Namespace) -> argparse.Namespace:
    """Raises `ConfigError` for values that no preset allows."""
    if own.what != "score" and own.run is not None:
        raise ConfigError(f"{own.what} {own.run}: a run's folder is for score; give flags with --")
    if own.what == "score" and own.run is None:
        raise ConfigError("score needs the folder of a run, as --run.output_dir named it")
    if own.what in ("efficiency", "render", "score") and (own.tasks or own.seeds):
        raise ConfigError(f"{own.what} is of no single task or seed; leave out --{'tasks' if own.tasks else 'seeds'}")
    if own.jobs < 1:
        raise ConfigError(f"--jobs is {own.jobs}; it must be at least 1")
    if any(seed < 0 for seed in own.seeds):
        raise ConfigError(f"--seeds is {own.seeds}; a seed is a whole number from 0 on")
    return own


if __name__ == "__main__":
    run_main(main)
