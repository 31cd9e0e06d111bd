"""A suite's files: `raw/bench-<suite>.json`, or `raw/bench-<suite>-<preset>.json`; table and figure are made from it.

The raw file holds every single measurement and where it comes from, without names of machines or folders.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.bench.suite import SUITES, Measured, Raw, Suite, load_suite
from hpc.config import Config
from hpc.files import drafted
from hpc.report.events import decode
from hpc.report.provenance import git_commit, machine, versions, without_folders
from hpc.report.summary import write_json_atomic

RESULTS = Path("results")


def raw_path(results: Path, name: str) -> Path:
    """`name`: a suite's, or a suite's and a preset's (`named`)."""
    return results / "raw" / f"bench-{name}.json"


def table_path(results: Path, name: str) -> Path:
    return results / "tables" / f"bench-{name}.md"


def csv_path(results: Path, name: str) -> Path:
    return results / "tables" / f"bench-{name}.csv"


def figure_path(results: Path, name: str) -> Path:
    return results / "figures" / f"bench-{name}.png"


def named(suite: str, preset: str | None) -> str:
    """What the files of a suite are called that was measured as a preset says."""
    return suite if preset is None else f"{suite}-{preset}"


def names(results: Path) -> list[str]:
    """Of the raw files that are there: suite by suite, without a preset first."""
    there = {path.stem.removeprefix("bench-") for path in (results / "raw").glob("bench-*.json")}
    found = [name for suite in SUITES for name in sorted(there) if name == suite or name.startswith(named(suite, ""))]
    return list(dict.fromkeys(found))


def save(
    results: Path, suite: str, measured: Measured, provenance: dict[str, Any], *, preset: str | None = None
) -> Path:
    """Write the raw file; the old one stays whole until the new one is."""
    path = raw_path(results, named(suite, preset))
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = load_suite(suite).figures(measured)
    write_json_atomic(path, {"suite": suite, **provenance, "figures": figures, "measured": measured})
    return path


def load(path: Path) -> Raw:
    raw: Raw = decode(json.loads(path.read_text(encoding="utf-8")))
    return raw


def render(results: Path) -> list[Path]:
    """Make the tables and the figure of every raw file again; returns the files written."""
    return [path for name in names(results) for path in render_one(results, name)]


def render_one(results: Path, name: str) -> list[Path]:
    raw = load(raw_path(results, name))
    suite: Suite = load_suite(raw["suite"])
    figure = figure_path(results, name)
    texts = {table_path(results, name): suite.table(raw)}
    if suite.csv is not None:
        texts[csv_path(results, name)] = suite.csv(raw)
    for path in (*texts, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        with drafted(path) as draft:
            draft.write_text(text, encoding="utf-8")
    return [*texts, suite.draw(raw, figure)]


def provenance(config: Config, arguments: Sequence[str], *, script: str = "launch/bench.py") -> dict[str, Any]:
    """Where the numbers come from. `arguments`: the command line behind `script`."""
    about = machine()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join([f"python {script}", *(without_folders(each) for each in arguments)]),
        "git_commit": git_commit(),
        "machine": about,
        "threads": {
            "--run.threads": config.run.threads,
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        },
        "versions": versions(),
    }
