"""What a benchmark suite is: one that measures, and pure functions from the measurements to figures and a table.

A new suite is a module of this package with a `SUITE`, and a line in `SUITES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hpc.config import Config

Measured = dict[str, Any]
Figures = dict[str, Any]
Raw = Mapping[str, Any]

SUITES = {
    "schedules": "hpc.bench.schedules",
    "generation": "hpc.bench.generation",
    "scale": "hpc.bench.scale",
    "efficiency": "hpc.bench.efficiency",
}


@dataclass(kw_only=True, frozen=True)
class Options:
    """What the command line asks of a suite."""

    config: Config
    flags: tuple[str, ...]
    """The command line of `config`, which every run of the suite gets before its own flags."""
    local: Path
    """`launch/local.py`, which starts a run."""
    folder: Path
    """Where the suite's runs write."""
    turns: int
    """Turns after the warm-up, of each member of a ring."""
    rings: int = 1
    """Over how many rings, one after the other, the federations are dealt: as many as memory asks for."""


@dataclass(kw_only=True, frozen=True)
class Suite:
    """`figures` and `table` are pure: a table can be made again from the raw file alone."""

    title: str
    measure: Callable[[Options], Measured]
    """Every single measurement, fit for JSON."""
    figures: Callable[[Mapping[str, Any]], Figures]
    """Medians, ratios and goals from what was measured."""
    table: Callable[[Raw], str]
    """Markdown from the content of a raw file (`hpc.bench.results`)."""
    draw: Callable[[Raw, Path], Path]
    csv: Callable[[Raw], str] | None = None
    """The table's numbers for other programs, where a suite has them."""


def load_suite(name: str) -> Suite:
    """Its module is imported only now, as suites need torch and rendering does not."""
    suite: Suite = import_module(SUITES[name]).SUITE
    return suite
