"""From runs' files, made up and worked out by hand, to rows and pages."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest

from hpc.errors import DataError
from hpc.metrics.spread import Spread
from hpc.reproduce import csv_file, markdown, published, raw, render, tuning
from hpc.reproduce.loss_figure import pairs_of
from hpc.reproduce.metric_figure import panels_of
from hpc.reproduce.numbers import fixed, loss_difference, mean_and_sd, points
from hpc.reproduce.plan import tuning_jobs
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import Row, rows_of, sort_out
from tests.unit.reproduce_case import PRESET, broken_promises, fill, jobs, made_up_preset, put, raw_of

PRESETS = Path(__file__).resolve().parents[2] / "launch" / "presets"


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return made_up_preset(tmp_path / "presets")


def row(preset: Preset, results: Path, **wanted: str) -> Row:
    """The one row that has these fields."""
    rows = rows_of(preset, "table1", render.runs_of(results, preset))
    (found,) = [each for each in rows if all(getattr(each, name) == value for name, value in wanted.items())]
    return found


# --- rows


def test_a_row_is_mean_and_deviation_over_seeds(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    found = row(preset, tmp_path, task="rte", method="centralised")
    assert found.metrics["accuracy"].mean == 55.0
    assert found.metrics["accuracy"].sd == pytest.approx(math.sqrt(50))  # (5² + 5²) / (2 - 1)
    assert [result.run for result in found.results] == [
        "tiny-rte-lora-centralised-seed0",
        "tiny-rte-lora-centralised-seed1",
    ]
    assert found.planned == 2
    assert found.comparison is None


def test_rows_come_as_in_the_preset_and_untrained_first(tmp_path: Path, preset: Preset) -> None:
    rows = rows_of(preset, "table1", {})
    assert list(dict.fromkeys((each.adapter, each.method) for each in rows)) == [
        ("none", "zero_shot"),
        ("lora", "centralised"),
        ("lora", "serial"),
        ("lora", "centralised_union"),
        ("lora", "client_batch"),
        ("lora", "replica"),
    ]
    assert list(dict.fromkeys(each.task for each in rows)) == ["rte", "cb"]
    assert not any(each.results for each in rows)


def test_zero_shot_is_what_a_run_said_before_its_first_step(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    found = row(preset, tmp_path, task="rte", method="zero_shot")
    assert found.metrics["accuracy"] == (25.0, None)
    assert found.unparsed == 1
    assert found.adapter == "none"
    assert [result.run for result in found.results] == ["tiny-rte-lora-centralised-seed0"]


def test_the_split_is_compared_seed_by_seed(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    equal = row(preset, tmp_path, task="cb", method="serial").comparison
    assert equal is not None
    assert equal.is_equal
    assert equal.reference == "centralised"
    assert equal.differences == {"accuracy": [0.0, 0.0], "macro_f1": [0.0, 0.0]}
    assert equal.loss == equal.relative_loss == 0.0
    sums = row(preset, tmp_path, task="cb", method="client_batch").comparison
    assert sums is not None
    assert sums.is_equal
    assert sums.reference == "centralised_union"
    assert sums.loss == pytest.approx(1e-6)
    assert sums.relative_loss == pytest.approx(1e-6 / 1.5)  # the reference's losses are 2 and 1
    off = row(preset, tmp_path, task="cb", method="replica").comparison
    assert off is not None
    assert not off.is_equal
    assert off.differences == {"accuracy": [-2.0, 0.0], "macro_f1": [-1.0, 0.0]}


def test_a_seed_without_its_reference_is_not_compared(tmp_path: Path, preset: Preset) -> None:
    for job in [*jobs(preset, method="serial", task="rte"), *jobs(preset, method="centralised", task="rte", seed=1)]:
        put(tmp_path, preset, raw_of(preset, job))
    comparison = row(preset, tmp_path, task="rte", method="serial").comparison
    assert comparison is not None
    assert len(comparison.equal) == 1
    (tmp_path / raw.FOLDER / preset.name / "tiny-rte-lora-centralised-seed1.json").unlink()
    assert row(preset, tmp_path, task="rte", method="serial").comparison is None


@pytest.mark.parametrize(
    ("changed", "loss"),
    [
        ({"predictions": {"sha256": "another", "chosen": [1, 1]}}, 0.0),
        ({"main": 50.0 + 1e-9}, 0.0),
        ({"losses": (2.0, 1.5)}, 0.5),
        ({"losses": (2.0, 1.0, 0.5)}, math.inf),
        ({"losses": (2.0, math.nan)}, math.nan),
    ],
)
def test_no_difference_is_overlooked(tmp_path: Path, preset: Preset, changed: dict, loss: float) -> None:
    fill(tmp_path, preset)
    (job,) = jobs(preset, method="serial", task="rte", seed=0)
    put(tmp_path, preset, raw_of(preset, job, **changed))
    comparison = row(preset, tmp_path, task="rte", method="serial").comparison
    assert comparison is not None
    assert comparison.loss == pytest.approx(loss, nan_ok=True)
    assert comparison.is_equal == ("losses" in changed)
    assert broken_promises([row(preset, tmp_path, task="rte", method="serial")])
    rows = rows_of(preset, "table1", render.runs_of(tmp_path, preset))
    page = markdown.page(preset, "table1", rows, render.runs_of(tmp_path, preset))
    assert ("NOT in rte, lora, FL-GLM, serial" in page) == ("losses" not in changed)


def test_another_seed_that_was_run_counts(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    more = made_up_preset(tmp_path / "more", PRESET.replace("seeds: [0, 1]", "seeds: [0, 1, 7]"))
    (job,) = jobs(more, method="serial", task="rte", seed=7)
    put(tmp_path, preset, raw_of(preset, job))
    found = row(preset, tmp_path, task="rte", method="serial")
    assert [result.seed for result in found.results] == [0, 1, 7]
    assert found.planned == 3
    assert row(preset, tmp_path, task="cb", method="serial").planned == 2


# --- files that cannot be used


def test_a_run_of_other_settings_is_not_used(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    changed = made_up_preset(tmp_path / "changed", PRESET.replace("cb: {batches: 4}", "cb: {batches: 6}"))
    runs, notes = sort_out(changed, raw.read_all(tmp_path, preset.name))
    assert {run["task"] for run in runs.values()} == {"rte"}
    assert not any(each.results for each in rows_of(changed, "table1", runs) if each.task == "cb")
    (note,) = notes
    assert "made with other settings than preset made_up has now" in note
    assert "and 11 more" in note  # and the two rates: 5 methods in 2 seeds, and 2
    assert "tiny-cb-lora-centralised-seed0-lr0.001.json" in note


def test_a_run_that_the_preset_has_not_is_not_used(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    fewer = made_up_preset(tmp_path / "fewer", PRESET.replace("rates: {lora: [0.001, 0.01]}", "rates: {lora: [0.01]}"))
    runs, (note,) = sort_out(fewer, raw.read_all(tmp_path, preset.name))
    assert "tiny-rte-lora-centralised-seed0-lr0.001" not in runs
    assert "of no run that preset made_up has" in note


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"format": 1, "job"', "cannot be read"),
        ("[]", "is no run's file"),
        ("{}", "has no 'preset'"),
        ({"metrics": {"accuracy": "high", "unparsed": 0}}, "'metrics'"),
        ({"metrics": {"accuracy": 1.0}}, "'metrics'"),
        ({"losses": [1.0, None]}, "'losses'"),
        ({"losses": []}, "'losses'"),
        ({"seed": "0"}, "'seed'"),
        ({"format": 2}, "of format 2"),
        ({"job": "another"}, "of run another"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, preset: Preset, text: str | dict, told: str) -> None:
    fill(tmp_path, preset)
    path = tmp_path / raw.FOLDER / preset.name / "tiny-rte-lora-serial-seed0.json"
    path.write_text(text if isinstance(text, str) else json.dumps(json.loads(path.read_text()) | text))
    with pytest.raises(DataError, match=r"tiny-rte-lora-serial-seed0\.json") as error:
        render.render_preset(tmp_path, preset)
    assert told in str(error.value)
    assert "delete it" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tables").exists()


# --- numbers


def test_nothing_is_rounded_away() -> None:
    assert points([0.0, 0.0]) == "0"
    assert points([1e-9]) == "+1e-09"
    assert points([-1.5]) == "-1.50"
    assert points([6.25, -6.25]) == "+0.00 (-6.25 … +6.25)"  # seeds that make up for one another are no equality
    assert points([-2.0, 0.0]) == "-1.00 (-2.00 … 0)"
    assert loss_difference(0.0) == "0"
    assert loss_difference(2.4e-7) == "2.4e-07"
    assert loss_difference(math.inf) == "inf"
    assert fixed(0.04, 1) == "4e-02"
    assert fixed(0.0, 1) == "0.0"
    assert mean_and_sd(Spread(55.0, 7.0710678)) == "55.0 ± 7.1"
    assert mean_and_sd(Spread(55.0, None)) == "55.0"


# --- pages


def test_a_page_has_ours_beside_the_published(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    runs = render.runs_of(tmp_path, preset)
    page = markdown.page(preset, "table1", rows_of(preset, "table1", runs), runs)
    assert "made up: no run was made for it" in page
    assert line(page, "| lora", "FL-GLM, serial ") == ["lora", "FL-GLM, serial", "55.0 ± 7.1", "55.0 ± 7.1"]
    assert line(page, "| none", "zero-shot") == ["none", "zero-shot", "25.0, 1 unparsed", "25.0, 1 unparsed"]
    assert line(page, "| published", "FL-GLM, ChatGLM-6B") == ["published", "FL-GLM, ChatGLM-6B", "81.6", "–"]
    apart = line(page, "| lora", "FL-GLM, replica-parallel", "centralised, all")
    assert apart[3:] == ["-1.00 (-2.00 … 0); 2 of 2; 0"] * 2
    assert line(page, "| lora", "client-batch", "centralised, all")[3:] == ["0; 2 of 2; 1.0e-06"] * 2
    assert "Pairs of runs compared: 8; so it is in all of them." in page
    assert "macro-F1" in page
    assert "commit `abc`" in page
    assert line(page, "| rte ", "64 / 16")[1:7] == ["0, 1", "2, iid", "8", "4", "2", "64 / 16"]


def line(page: str, *parts: str) -> list[str]:
    """The cells of the first line that has all these parts."""
    found = next(each for each in page.splitlines() if all(part in each for part in parts))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_a_cell_without_a_run_is_a_dash(tmp_path: Path, preset: Preset) -> None:
    for job in [*jobs(preset, method="centralised", task="rte"), *jobs(preset, method="serial", task="rte", seed=0)]:
        put(tmp_path, preset, raw_of(preset, job))
    runs = render.runs_of(tmp_path, preset)
    page = markdown.page(preset, "table1", rows_of(preset, "table1", runs), runs)
    assert line(page, "FL-GLM, serial ")[2:] == ["50.0 (1 of 2 seeds)", "–"]
    assert line(page, "FL-GLM, replica-parallel ")[2:] == ["–", "–"]
    assert "18 of 22 results are missing" in page  # 5 rows of 2 tasks in 2 seeds, and untrained once: 4 are there


def test_the_csv_loses_nothing_and_names_the_runs(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    rows = rows_of(preset, "table1", render.runs_of(tmp_path, preset))
    lines = list(csv.DictReader(csv_file.text(rows).splitlines()))
    assert len(lines) == 2 * 6
    (found,) = [each for each in lines if (each["task"], each["method"]) == ("rte", "client_batch")]
    assert float(found["accuracy_sd"]) == rows[2].metrics["accuracy"].sd == math.sqrt(50)
    assert found["macro_f1_mean"] == ""
    assert found["runs"] == "tiny-rte-lora-client_batch-seed0 tiny-rte-lora-client_batch-seed1"
    assert (found["reference"], found["difference_mean"], found["predictions_equal"]) == (
        "centralised_union",
        "0.0",
        "2",
    )
    assert float(found["loss_difference"]) == (1.0 + 1e-6) - 1.0
    (serial,) = [each for each in lines if (each["task"], each["method"]) == ("rte", "serial")]
    assert serial["published"] == "FL-GLM, ChatGLM-6B: accuracy 81.6"


def test_the_best_rate_is_the_one_of_the_lowest_loss_on_all_tasks(tmp_path: Path, preset: Preset) -> None:
    low, high = 0.001, 0.01
    held_out = {("rte", low): 1.0, ("cb", low): 1.0, ("rte", high): 0.2, ("cb", high): 1.7}
    for job in tuning_jobs(preset):
        loss = held_out[job.task, job.flags["train.learning_rate"]]
        put(tmp_path, preset, raw_of(preset, job, eval_loss=loss))
    rates = tuning.tried(preset, render.runs_of(tmp_path, preset))
    assert [(each.rate, each.mean, each.used) for each in rates] == [(low, 1.0, False), (high, 0.95, True)]
    assert tuning.best(rates, "lora") == rates[1]
    (tmp_path / raw.FOLDER / preset.name / "tiny-cb-lora-centralised-seed0-lr0.001.json").unlink()
    runs = render.runs_of(tmp_path, preset)
    assert tuning.best(tuning.tried(preset, runs), "lora") is None  # it might have been better
    assert line(tuning.page(preset, runs), "| lora", "0.001") == ["lora", "0.001", "1.0000", "–", "–", "", ""]


def test_the_curves_of_a_panel_are_of_one_seed(tmp_path: Path, preset: Preset) -> None:
    for job in [*jobs(preset, method="centralised", task="rte"), *jobs(preset, method="serial", task="rte", seed=1)]:
        put(tmp_path, preset, raw_of(preset, job, losses=(2.0, float(job.seed))))
    panels = pairs_of(rows_of(preset, "table1", render.runs_of(tmp_path, preset)))
    ((_, adapters),) = panels.items()
    assert [(result.run, result.losses[1]) for result in adapters["lora"]] == [
        ("tiny-rte-lora-centralised-seed1", 1.0),
        ("tiny-rte-lora-serial-seed1", 1.0),
    ]


def test_the_untrained_model_stands_beside_the_trained_ones(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    rows = rows_of(preset, "table1", render.runs_of(tmp_path, preset))
    ((key, own),) = panels_of([*rows, *rows]).items()  # two tables may have the same row
    assert key == ("tiny", "lora")
    assert len(own) == 2 * 6


def test_published_numbers_are_of_tasks_and_tables_that_there_are() -> None:
    tables = {"table1", "table2", "table4", "table5"}
    known = {(table, task) for name in ("small",) for table, task in tasks_of(load_preset(name, PRESETS))}
    assert {each.table for each in [*published.SCORES, *published.GAPS]} <= tables
    assert {(each.table, each.task) for each in [*published.SCORES, *published.GAPS]} <= known


def tasks_of(preset: Preset) -> set[tuple[str, str]]:
    return {(table, task) for table, blocks in preset.tables.items() for block in blocks for task in block.tasks}
