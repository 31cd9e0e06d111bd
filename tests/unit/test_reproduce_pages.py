"""A table's pages, from runs' files made up and worked out by hand: numbers, text, CSV, panels of the figures."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from hpc.metrics.spread import Spread
from hpc.reproduce import csv_file, markdown, published, raw, render, tuning
from hpc.reproduce.loss_figure import pairs_of
from hpc.reproduce.metric_figure import panels_of
from hpc.reproduce.numbers import fixed, loss_difference, mean_and_sd, points
from hpc.reproduce.plan import tuning_jobs
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import rows_of
from tests.unit.reproduce_case import fill, jobs, made_up_preset, put, raw_of

PRESETS = Path(__file__).resolve().parents[2] / "launch" / "presets"


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return made_up_preset(tmp_path / "presets")


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
    (job,) = jobs(preset, method="replica", task="rte", seed=0)
    put(tmp_path, preset, raw_of(preset, job, main=48.0, predictions={"sha256": "another", "chosen": [0, 0]}))
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
    (replica,) = [each for each in lines if (each["task"], each["method"]) == ("rte", "replica")]
    assert (replica["difference_mean"], replica["seeds_compared"], replica["predictions_equal"]) == ("-1.0", "2", "1")
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
    known = tasks_of(load_preset("small", PRESETS))
    assert {each.table for each in [*published.SCORES, *published.GAPS]} <= tables
    assert {(each.table, each.task) for each in [*published.SCORES, *published.GAPS]} <= known


def tasks_of(preset: Preset) -> set[tuple[str, str]]:
    return {(table, task) for table, blocks in preset.tables.items() for block in blocks for task in block.tasks}
