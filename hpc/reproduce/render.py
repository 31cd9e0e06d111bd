"""All tables and figures again, from the committed runs' files. Whatever is written appears whole, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from hpc.errors import HpcError
from hpc.files import drafted, try_lock
from hpc.reproduce import attack_csv, attack_page, csv_file, markdown, raw, tuning
from hpc.reproduce.attack_plan import TABLE as ATTACK_TABLE
from hpc.reproduce.attack_rows import Attacked, attacked_rows
from hpc.reproduce.leakage_figure import draw_leakage
from hpc.reproduce.loss_figure import draw_losses
from hpc.reproduce.metric_figure import draw_metrics
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import Row, Runs, rows_of, sort_out

DEADLINE_S = 120.0  # for another process that renders; it takes seconds


class RenderTimeout(HpcError):
    """Another process holds the lock for longer than a rendering can take."""


def render(
    results: Path, presets: Path, *, others: Sequence[Preset] = (), say: Callable[[str], None] = print
) -> list[Path]:
    """Tables and figures of every preset of the folder `presets` that has runs in `results`; returns what was written.

    `others`: presets from elsewhere.

    A run's file that was made with other settings than its preset has now is not used, which `say` is told. Raises
    `DataError` for a file that is broken, and `RenderTimeout`.
    """
    known = {path.stem: load_preset(path.stem, presets) for path in presets.glob("*.yaml")}
    known.update({preset.name: preset for preset in others})
    written = []
    for name in sorted(folder.name for folder in (results / raw.FOLDER).glob("*") if any(folder.glob("*.json"))):
        if name in known:
            written += render_preset(results, known[name], say)
        else:
            say(f"{raw.FOLDER / name} is not rendered: there is no preset {name}; give its file as --preset")
    return written


def render_preset(results: Path, preset: Preset, say: Callable[[str], None] = print) -> list[Path]:
    """The same for one preset, whose file may lie anywhere."""
    with _alone(results):
        runs = runs_of(results, preset, say)
        tables = tables_of(preset, runs)
        attacked = attacked_rows(preset, runs)
        texts = pages(preset, tables, runs) | attack_pages(preset, attacked, runs)
        for name, text in texts.items():
            with drafted(results / "tables" / name) as draft:
                draft.write_text(text, encoding="utf-8")
        for name in every_page(preset) - texts.keys():
            (results / "tables" / name).unlink(missing_ok=True)  # of runs that are gone, or are to be done again
        return [results / "tables" / name for name in texts] + _figures(results, preset, tables, attacked)


def runs_of(results: Path, preset: Preset, say: Callable[[str], None] = print) -> Runs:
    """The preset's runs that are there; `say` is told of files that are not used. Raises `DataError`."""
    runs, notes = sort_out(preset, raw.read_all(results, preset.name))
    for note in notes:
        say(note)
    return runs


def tables_of(preset: Preset, runs: Runs) -> dict[str, list[Row]]:
    """Table → rows, of each that has a run."""
    tables = {table: rows_of(preset, table, runs) for table in preset.tables}
    return {table: rows for table, rows in tables.items() if any(row.results for row in rows)}


def pages(preset: Preset, tables: Mapping[str, Sequence[Row]], runs: Runs) -> dict[str, str]:
    """Name of a file in `tables/` → its text."""
    found = {}
    for table, rows in tables.items():
        found[f"{table}-{preset.name}.md"] = markdown.page(preset, table, rows, runs)
        found[f"{table}-{preset.name}.csv"] = csv_file.text(rows)
    if any(run["tuning"] for run in runs.values()):
        found[f"tuning-{preset.name}.md"] = tuning.page(preset, runs)
    return found


def attack_pages(preset: Preset, attacked: Sequence[Attacked], runs: Runs) -> dict[str, str]:
    """The same of table 3."""
    if not attacked:
        return {}
    name = f"{ATTACK_TABLE}-{preset.name}"
    return {f"{name}.md": attack_page.page(preset, attacked, runs), f"{name}.csv": attack_csv.text(attacked)}


def every_page(preset: Preset) -> set[str]:
    """Names of all files in `tables/` that a preset may have."""
    tables = {f"{table}-{preset.name}.{ending}" for table in [*preset.tables, ATTACK_TABLE] for ending in ("md", "csv")}
    return tables | {f"tuning-{preset.name}.md"}


def _figures(results: Path, preset: Preset, tables: dict[str, list[Row]], attacked: Sequence[Attacked]) -> list[Path]:
    rows = [row for each in tables.values() for row in each]
    drawings = {
        "losses": partial(draw_losses, rows),
        "accuracy": partial(draw_metrics, rows),
        "leakage": partial(draw_leakage, attacked),
    }
    drawn = []
    for name, draw in drawings.items():
        path = results / "figures" / f"{name}-{preset.name}.png"
        with drafted(path) as draft:
            if draw(preset.scale, draft):
                drawn.append(path)
            else:
                path.unlink(missing_ok=True)
    return drawn


@contextmanager
def _alone(results: Path) -> Iterator[None]:
    """One rendering at a time, so that the last one to write is the last one that read."""
    path = results / "runs" / "reproduce" / ".render.lock"  # where nothing is committed
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + DEADLINE_S
    with path.open("w") as lock:
        while not try_lock(lock):
            if time.monotonic() > deadline:
                raise RenderTimeout(f"{path} is held by another process for {DEADLINE_S:.0f} s; end that one first")
            time.sleep(0.1)
        yield
