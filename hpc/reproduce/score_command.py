"""The metrics of any run that kept its predictions, whoever started it: `launch/reproduce.py score RUN_FOLDER`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hpc.cli import make_parser, parse
from hpc.config import Config
from hpc.errors import DataError
from hpc.reproduce.score import Scored, score_run

PREDICTIONS = re.compile(r"predictions-(\d+)-client-\d+\.jsonl")


def scores_of(folder: Path) -> str:
    """A line for each evaluated step. Raises `DataError` for a folder without a run or predictions, or broken ones."""
    config = config_of(folder)
    names = [path.name for path in folder.glob("roles/*/predictions-*.jsonl")]
    steps = sorted({int(found[1]) for name in names if (found := PREDICTIONS.fullmatch(name))})
    if not steps:
        why = "they are lost" if config.data.save_predictions else "the run was without --data.save_predictions true"
        raise DataError(f"{folder} has no predictions ({why}); run it again with --data.save_predictions true")
    return as_text(config.data.task, {step: score_run(folder, config, step) for step in steps})


def config_of(folder: Path) -> Config:
    """What the run was. Raises `DataError` for a folder that is none's, `ConfigError` for a broken `config.yaml`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise DataError(f"{folder} has no config.yaml, so it is no run's folder; give the --run.output_dir of a run")
    return parse(make_parser(""), ["--config", str(path)])[0]


def as_text(task: str, scored: Mapping[int, Scored]) -> str:
    """A table with a row for each step: metrics in percent; `unparsed` and `examples` are numbers of examples."""
    names = [name for name in next(iter(scored.values())).metrics if name != "unparsed"]
    rows = [["step", *names, "unparsed", "examples"]]
    for step, each in scored.items():
        values = [f"{each.metrics[name]:.2f}" for name in names]
        rows.append([str(step), *values, f"{each.metrics['unparsed']:.0f}", str(each.examples)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([f"{task}, held-out examples of all clients, in percent", *lines])
