"""A suite's files: `raw/bench-<suite>.json`, and the table and figure made from it.

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
from hpc.report.events import decode
from hpc.report.provenance import git_commit, machine, versions
from hpc.report.summary import write_json_atomic

RESULTS = Path("results")


def raw_path(results: Path, name: str) -> Path:
    return results / "raw" / f"bench-{name}.json"


def table_path(results: Path, name: str) -> Path:
    return results / "tables" / f"bench-{name}.md"


def figure_path(results: Path, name: str) -> Path:
    return results / "figures" / f"bench-{name}.png"


def save(results: Path, name: str, measured: Measured, provenance: dict[str, Any]) -> Path:
    """Write the raw file; the old one stays whole until the new one is."""
    path = raw_path(results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = load_suite(name).figures(measured)
    write_json_atomic(path, {"suite": name, **provenance, "figures": figures, "measured": measured})
    return path


def load(path: Path) -> Raw:
    raw: Raw = decode(json.loads(path.read_text(encoding="utf-8")))
    return raw


def render(results: Path) -> list[Path]:
    """Make the table and the figure of every raw file again; returns the files written."""
    written = []
    for name in SUITES:
        if raw_path(results, name).exists():
            written += _render_one(results, name, load_suite(name))
    return written


def _render_one(results: Path, name: str, suite: Suite) -> list[Path]:
    raw, table, figure = load(raw_path(results, name)), table_path(results, name), figure_path(results, name)
    for path in (table, figure):
        path.parent.mkdir(parents=True, exist_ok=True)
    draft = table.with_name(f".{table.name}.{os.getpid()}")
    draft.write_text(suite.table(raw), encoding="utf-8")
    os.replace(draft, table)
    return [table, suite.draw(raw, figure)]


def provenance(config: Config, arguments: Sequence[str]) -> dict[str, Any]:
    """Where the numbers come from. `arguments`: the command line behind `launch/bench.py`."""
    about = machine()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": " ".join(["python launch/bench.py", *(without_folders(each) for each in arguments)]),
        "git_commit": git_commit(),
        "machine": about,
        "threads": {
            "--run.threads": config.run.threads,
            **{name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        },
        "versions": versions(),
    }


def without_folders(argument: str) -> str:
    """An absolute path as seen from here, or its last part: a raw file tells nothing of this machine's folders."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    path = Path(value)
    if not path.is_absolute():
        return argument
    here = Path.cwd()
    return flag + equals + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)
