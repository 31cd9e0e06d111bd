"""Rendering results/: files that appear whole, and that what is committed says what was run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.files import drafted
from hpc.reproduce import raw, render, tuning
from hpc.reproduce.loss_figure import pairs_of
from hpc.reproduce.methods import METHODS
from hpc.reproduce.metric_figure import panels_of
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import rows_of, sort_out
from tests.unit.reproduce_case import broken_promises, fill, jobs, made_up_preset, put, raw_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PRESETS = ROOT / "results", ROOT / "launch" / "presets"
COMMITTED = [path.stem for path in sorted(PRESETS.glob("*.yaml")) if any((RESULTS / raw.FOLDER / path.stem).glob("*"))]


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return made_up_preset(tmp_path / "presets")


# --- files


def test_two_at_once_and_from_the_command_line(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    command = [sys.executable, str(ROOT / "launch" / "reproduce.py"), "render", "--results_dir", str(tmp_path)]
    command += ["--preset", str(tmp_path / "presets" / "made_up.yaml")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        said = [process.communicate(timeout=90) for process in both]
    finally:
        for process in both:
            process.kill()
            process.wait()
    assert [process.returncode for process in both] == [0, 0], said
    names = ["table1-made_up.md", "table1-made_up.csv", "tuning-made_up.md"]
    figures = [f"{name}-made_up.png" for name in ("losses", "accuracy")]
    paths = [tmp_path / "tables" / name for name in names] + [tmp_path / "figures" / name for name in figures]
    assert [out.splitlines() for out, _ in said] == [[str(path) for path in paths]] * 2
    runs = render.runs_of(tmp_path, preset)
    texts = render.pages(preset, render.tables_of(preset, runs), runs)
    assert {name: (tmp_path / "tables" / name).read_text() for name in names} == texts
    left = [path for path in tmp_path.rglob(".*") if path.name != ".render.lock"]
    assert not left
    assert stale_pages(tmp_path, preset) == []


def test_who_holds_the_lock_for_too_long_is_named(
    tmp_path: Path, preset: Preset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "DEADLINE_S", 0.2)
    with (
        render._alone(tmp_path),
        pytest.raises(render.RenderTimeout, match=r"\.render\.lock is held by another process"),
    ):
        render.render_preset(tmp_path, preset)
    render.render_preset(tmp_path, preset)


def test_a_figure_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "figure.png"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), drafted(path) as draft:
        draft.with_name("no").joinpath("such folder").write_text(str(draft.write_text("half")))
    assert [each.name for each in tmp_path.iterdir()] == ["figure.png"]
    assert path.read_text() == "old"


def test_runs_of_a_preset_that_is_not_known_are_named(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    said: list[str] = []
    assert render.render(tmp_path, PRESETS, say=said.append) == []
    assert said == ["raw/reproduce/made_up is not rendered: there is no preset made_up; give its file as --preset"]


# --- what is committed


def stale_pages(results: Path, preset: Preset) -> list[str]:
    """Files of tables/ that are not what the runs' files make."""
    runs = render.runs_of(results, preset)
    texts = render.pages(preset, render.tables_of(preset, runs), runs)
    every = {f"{name}-{preset.name}.{end}" for name in [*preset.tables, "tuning"] for end in ("md", "csv")}
    there = {name: path.read_text(encoding="utf-8") for name in every if (path := results / "tables" / name).exists()}
    return sorted(name for name in every if there.get(name) != texts.get(name))


def test_a_table_that_is_stale_is_found(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    names = sorted(["table1-made_up.csv", "table1-made_up.md", "tuning-made_up.md"])
    assert stale_pages(tmp_path, preset) == names  # as none is there yet
    runs = render.runs_of(tmp_path, preset)
    (tmp_path / "tables").mkdir()
    for name, text in render.pages(preset, render.tables_of(preset, runs), runs).items():
        (tmp_path / "tables" / name).write_text(text, encoding="utf-8")
    assert stale_pages(tmp_path, preset) == []
    (job,) = jobs(preset, method="replica", task="rte", seed=0)
    put(tmp_path, preset, raw_of(preset, job, main=48.5))
    assert stale_pages(tmp_path, preset) == names[:2]


def test_every_row_of_the_same_function_is_held_to_it() -> None:
    bounds = {name: method.loss_bound for name, method in METHODS.items() if method.same_function}
    assert bounds == {"serial": 0.0, "fedbert": 0.0, "client_batch": 1e-3}


def test_a_broken_promise_is_found(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    assert broken_promises(rows_of(preset, "table1", render.runs_of(tmp_path, preset))) == []
    (job,) = jobs(preset, method="client_batch", task="cb", seed=1)
    put(tmp_path, preset, raw_of(preset, job, main=60.0, losses=(2.0, 1.01)))
    (tmp_path / raw.FOLDER / preset.name / "tiny-rte-lora-centralised-seed0.json").unlink()
    rows = rows_of(preset, "table1", render.runs_of(tmp_path, preset))
    assert broken_promises(rows) == ["table1, rte, lora, serial", "table1, cb, lora, client_batch"]


@pytest.fixture(params=COMMITTED or [pytest.param(None, marks=pytest.mark.skip(reason="no runs are committed yet"))])
def committed(request: pytest.FixtureRequest) -> Preset:
    return load_preset(request.param, PRESETS)


def test_the_committed_tables_say_what_was_run(committed: Preset) -> None:
    assert stale_pages(RESULTS, committed) == [], "python launch/reproduce.py render"
    runs = render.runs_of(RESULTS, committed)
    rows = [each for table in committed.tables for each in rows_of(committed, table, runs)]
    drawn = {"losses": pairs_of(rows), "accuracy": panels_of(rows)}
    for name in [name for name, panels in drawn.items() if panels]:
        assert (RESULTS / "figures" / f"{name}-{committed.name}.png").exists()


def test_every_committed_run_is_used_and_tells_of_no_folder(committed: Preset) -> None:
    paths = sorted((RESULTS / raw.FOLDER / committed.name).glob("*"))
    runs, notes = sort_out(committed, raw.read_all(RESULTS, committed.name))
    assert notes == []
    assert {path.name for path in paths} == {f"{name}.json" for name in runs}
    told = [path.name for path in paths if re.search(r"[\"' =](/home|/root|/work|/tmp|/Users)/", path.read_text())]
    assert told == [], "a folder of somebody's machine"


def test_every_committed_split_run_is_as_its_reference(committed: Preset) -> None:
    runs = render.runs_of(RESULTS, committed)
    assert [name for table in committed.tables for name in broken_promises(rows_of(committed, table, runs))] == []


def test_the_presets_rates_are_the_best_of_those_tried(committed: Preset) -> None:
    runs = render.runs_of(RESULTS, committed)
    if not any(run["tuning"] for run in runs.values()):
        pytest.skip(f"preset {committed.name} tried no learning rates")
    rates = tuning.tried(committed, runs)
    best = {each.adapter: tuning.best(rates, each.adapter) for each in rates}
    assert [adapter for adapter, rate in best.items() if rate is None or not rate.used] == []


def test_pages_of_runs_that_are_no_longer_there_go(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    written = render.render_preset(tmp_path, preset)
    assert all(path.exists() for path in written)
    shutil.rmtree(tmp_path / raw.FOLDER / preset.name)
    assert render.render_preset(tmp_path, preset) == []
    assert not any(path.exists() for path in written)
