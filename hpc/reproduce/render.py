"""All tables and figures again, from the committed runs' files. Whatever is written appears whole, or not at all."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc.errors import HpcError
from hpc.reproduce import csv_file, markdown, raw, tuning
from hpc.reproduce.figures import draw_losses, draw_metrics
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import Row, Runs, rows_of, sort_out

DEADLINE_S = 120.0  # for another process that renders; it takes seconds


class RenderTimeout(HpcError):
    """Another process holds the lock for longer than a rendering can take."""


def render(results: Path, presets: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Tables and figures of every preset of the folder `presets` that has runs in `results`; returns what was written.

    A run's file that was made with other settings than its preset has now is not used, which `say` is told. Raises
    `DataError` for a file that is broken, and `RenderTimeout`.
    """
    names = sorted(folder.name for folder in (results / raw.FOLDER).glob("*") if any(folder.glob("*.json")))
    known = [load_preset(name, presets) for name in names if (presets / f"{name}.yaml").exists()]
    for name in set(names) - {preset.name for preset in known}:
        say(f"{raw.FOLDER / name} is not rendered: there is no preset of that name; give its file as --preset")
    return [path for preset in known for path in render_preset(results, preset, say)]


def render_preset(results: Path, preset: Preset, say: Callable[[str], None] = print) -> list[Path]:
    """The same for one preset, whose file may lie anywhere."""
    with _alone(results):
        runs, notes = sort_out(preset, raw.read_all(results, preset.name))
        for note in notes:
            say(note)
        tables = {table: rows_of(preset, table, runs) for table in preset.tables}
        begun = {table: rows for table, rows in tables.items() if any(row.results for row in rows)}
        pages = {
            path: text for table, rows in begun.items() for path, text in _texts(preset, table, rows, runs).items()
        }
        if any(run["tuning"] for run in runs.values()):
            pages[f"tuning-{preset.name}.md"] = tuning.page(preset, runs)
        for name, text in pages.items():
            with _draft(results / "tables" / name) as draft:
                draft.write_text(text, encoding="utf-8")
        return [results / "tables" / name for name in pages] + _figures(results, preset, begun)


def _texts(preset: Preset, table: str, rows: list[Row], runs: Runs) -> dict[str, str]:
    name = f"{table}-{preset.name}"
    return {f"{name}.md": markdown.page(preset, table, rows, runs), f"{name}.csv": csv_file.text(rows)}


def _figures(results: Path, preset: Preset, tables: dict[str, list[Row]]) -> list[Path]:
    rows = [row for each in tables.values() for row in each]
    drawn = []
    for name, draw in (("losses", draw_losses), ("accuracy", draw_metrics)):
        path = results / "figures" / f"{name}-{preset.name}.png"
        with _draft(path) as draft:
            if draw(rows, preset.scale, draft):
                drawn.append(path)
    return drawn


@contextmanager
def _draft(path: Path) -> Iterator[Path]:
    """A name to write to; what is there at the end becomes `path` at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        if draft.exists():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _alone(results: Path) -> Iterator[None]:
    """One rendering at a time, so that the last one to write is the last one that read."""
    path = results / "runs" / "reproduce" / ".render.lock"  # where nothing is committed
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + DEADLINE_S
    with path.open("w") as lock:
        while not _locked(lock.fileno()):
            if time.monotonic() > deadline:
                raise RenderTimeout(f"{path} is held by another process for {DEADLINE_S:.0f} s; end that one first")
            time.sleep(0.1)
        yield


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
