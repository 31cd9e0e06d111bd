"""From runs' files, made up and worked out by hand, to a table's rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hpc.errors import DataError
from hpc.reproduce import markdown, raw, render, tuning
from hpc.reproduce.plan import tuning_jobs
from hpc.reproduce.preset import Preset
from hpc.reproduce.rows import Row, rows_of, sort_out
from tests.unit.reproduce_case import PRESET, broken_promises, fill, jobs, made_up_preset, put, raw_of


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
    assert equal.is_kept
    assert equal.reference == "centralised"
    assert equal.differences == {"accuracy": [0.0, 0.0], "macro_f1": [0.0, 0.0]}
    assert equal.loss == equal.relative_loss == 0.0
    sums = row(preset, tmp_path, task="cb", method="client_batch").comparison
    assert sums is not None
    assert sums.is_kept
    assert sums.reference == "centralised_union"
    assert sums.loss == pytest.approx(1e-6)
    assert sums.relative_loss == pytest.approx(1e-6 / 1.5)  # the reference's losses are 2 and 1
    off = row(preset, tmp_path, task="cb", method="replica").comparison
    assert off is not None
    assert not off.is_kept
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
    assert not comparison.is_kept
    assert broken_promises([row(preset, tmp_path, task="rte", method="serial")])
    rows = rows_of(preset, "table1", render.runs_of(tmp_path, preset))
    page = markdown.page(preset, "table1", rows, render.runs_of(tmp_path, preset))
    assert "NOT in rte, lora, FL-GLM, serial" in page


def test_every_metric_must_be_equal(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    (job,) = jobs(preset, method="serial", task="cb", seed=0)
    put(tmp_path, preset, raw_of(preset, job, metrics={"accuracy": 50.0, "unparsed": 0, "macro_f1": 24.9}))
    assert broken_promises([row(preset, tmp_path, task="cb", method="serial")])


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


def test_runs_on_other_data_are_not_compared(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    (job,) = jobs(preset, method="serial", task="rte", seed=1)
    put(tmp_path, preset, raw_of(preset, job) | {"data_sha256": "of other data"})
    comparison = row(preset, tmp_path, task="rte", method="serial").comparison
    assert comparison is not None
    assert len(comparison.equal) == 1
    assert broken_promises([row(preset, tmp_path, task="rte", method="serial")])


def test_a_rate_that_diverged_is_never_the_best(tmp_path: Path, preset: Preset) -> None:
    fill(tmp_path, preset)
    for job in tuning_jobs(preset)[:1]:
        put(tmp_path, preset, raw_of(preset, job, eval_loss=math.nan))
    found = tuning.best(tuning.tried(preset, render.runs_of(tmp_path, preset)), "lora")
    assert found is not None
    assert not math.isnan(found.mean or 0.0)
