"""Table 3: which runs it needs, what is refused, and its page from files made up and worked out by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpc.errors import ConfigError, DataError
from hpc.reproduce import render
from hpc.reproduce.attack_plan import attack_jobs
from hpc.reproduce.attack_rows import attacked_rows
from hpc.reproduce.attacked import KEPT, attacks_on, options_of
from hpc.reproduce.every_cell import every_table, table_cells
from hpc.reproduce.measured_docs import PAGE, PRESET, filled_in, texts_of
from hpc.reproduce.plan import Job
from hpc.reproduce.preset import Preset, load_preset
from tests.unit.preset_case import ROOT, SHIPPED, preset_of
from tests.unit.reproduce_case import put, raw_of

ATTACKS: Mapping[str, Any] = {
    "model": "tiny",
    "adapter": "lora",
    "tasks": ["rte"],
    "cuts": {0: 3.0, 1: 45.0},
    "defences": {
        "none": {},
        "fedsea": {"privacy.noise_scale": 0.1},
        "gauss": {"privacy.noise_multiplier": 0.5},
        "own": {"privacy.epsilon": 8.0, "privacy.clip_norm": 7.0},
    },
    "methods": {"nearest_embedding": {}, "causal_search": {"causal_search.candidates": 64}},
    "options": {"max_rows": 4},
}
ADAPTERS = {"lora": {"adapter.method": "lora", "train.learning_rate": 1e-3}}


def attacking(folder: Path, **changes: Any) -> Preset:
    tables = {"table1": [{"model": "tiny", "adapters": ["lora"], "tasks": ["copa"], "methods": ["centralised"]}]}
    given = {"adapters": ADAPTERS, "tables": tables, "attacks": {**ATTACKS, **changes}}
    return preset_of(folder, **given)


def test_each_cut_and_defence_has_one_run_in_which_every_head_is_its_owners(tmp_path: Path) -> None:
    jobs = attack_jobs(attacking(tmp_path))
    assert len({job.name for job in jobs}) == len(jobs) == 2 * 4 * 2  # cuts, defences, seeds
    assert len({job.fingerprint for job in jobs}) == len(jobs)
    assert jobs[0].name == "tiny-rte-lora-attacked-seed0-cut0-none"
    assert {job.flags["train.aggregation"] for job in jobs} == {"none"}
    assert {job.flags["privacy.record_steps"] for job in jobs} == {jobs[0].flags["train.max_steps"]} == {3}
    assert {job.flags["model.head_blocks"] for job in jobs} == {0, 1}


def test_noise_that_needs_a_norm_has_that_of_its_cut_unless_it_names_one(tmp_path: Path) -> None:
    clips = {job.variant: job.flags.get("privacy.clip_norm") for job in attack_jobs(attacking(tmp_path))}
    assert clips == {
        "cut0-none": None, "cut1-none": None, "cut0-fedsea": None, "cut1-fedsea": None,
        "cut0-gauss": 3.0, "cut1-gauss": 45.0, "cut0-own": 7.0, "cut1-own": 7.0,
    }  # fmt: skip


def test_fewer_attacks_on_defended_runs_where_the_preset_says_so(tmp_path: Path) -> None:
    changes = {"on_defended": ["nearest_embedding"], "options_on_defended": {"max_rows": 2}}
    tried = {job.variant: job.attacks for job in attack_jobs(attacking(tmp_path, **changes))}
    assert {name: each["max_rows"] for name, each in tried["cut0-none"].items()} == {
        "nearest_embedding": 4,
        "causal_search": 4,
    }
    assert tried["cut1-gauss"] == {"nearest_embedding": {"max_rows": 2}}


def test_another_option_of_an_attack_makes_another_run(tmp_path: Path) -> None:
    one = attack_jobs(attacking(tmp_path))[0]
    other = attack_jobs(attacking(tmp_path, options={"max_rows": 5}))[0]
    assert one.name == other.name
    assert one.fingerprint != other.fingerprint


def test_options_are_those_of_the_attack_command(tmp_path: Path) -> None:
    preset = attacking(tmp_path)
    found = options_of(preset.name, attack_jobs(preset)[0])
    assert [(name, each.method, each.max_rows) for name, each in found.items()] == [
        (name, name, 4) for name in ATTACKS["methods"]
    ]
    assert found["causal_search"].causal_search.candidates == 64


def test_table3_is_one_of_all_tables_where_there_are_attacks(tmp_path: Path) -> None:
    preset = attacking(tmp_path)
    assert every_table(preset) == ["table1", "table3"]
    assert every_table(preset_of(tmp_path)) == ["table1", "table4"]
    cells = table_cells(preset, ["table1", "table3"], ["rte"], [5])
    assert {(cell.table, cell.task, cell.seed) for cell in cells} == {("table3", "rte", 5)}
    assert {cell.table for cell in table_cells(preset, ["table1", "table3"], ["copa"], [])} == {"table1"}
    with pytest.raises(ConfigError, match="--tasks cb is not in table1, table3; choose of copa, rte"):
        table_cells(preset, ["table1", "table3"], ["cb"], [])
    with pytest.raises(ConfigError, match="--preset mine has no table3: its section `attacks` would say"):
        table_cells(preset_of(tmp_path), ["table3"], [], [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuts": {-1: 3.0}}, r"attacks\.cuts: -1 is no number of blocks"),
        ({"cuts": {0: 0}}, r"attacks\.cuts\.0 is 0; a norm to clip to must be a number above 0"),
        ({"cuts": {}}, r"attacks\.cuts must be a mapping"),
        ({"tasks": ["cb"]}, "attacks: task 'cb' is not one of rte, copa"),
        ({"on_defended": ["fsha"]}, r"attacks\.on_defended: attack 'fsha' is not one of nearest_embedding"),
        ({"model": "huge"}, "attacks: model 'huge' is not one of tiny"),
        ({"victim": 1}, "attacks has an unknown key 'victim'"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attacking(tmp_path, **changes)


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ({"nearest_neighbour": {}}, r"nearest_neighbour.*in attacks\.methods\.nearest_neighbour"),
        ({"causal_search": {"candidates": 3}}, r"unknown key attack\.candidates.*in attacks\.methods\.causal_search"),
        ({"causal_search": {"causal_search.candidates": -3}}, r"candidates.*-3"),
    ],
)
def test_an_unknown_attack_or_option_is_refused(tmp_path: Path, methods: dict[str, Any], message: str) -> None:
    preset = attacking(tmp_path, methods=methods)
    with pytest.raises(ConfigError, match=message):
        options_of(preset.name, attack_jobs(preset)[0])


def test_an_interrupt_ends_the_attacks_behind_the_one_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hpc.privacy import attack_run

    begun = []

    def attacks(folder: Path, several: list[Any]) -> Any:
        for options in several:
            begun.append(options.method)
            yield SimpleNamespace(document=lambda: dict.fromkeys(KEPT))

    monkeypatch.setattr(attack_run, "attack_runs", attacks)
    preset = attacking(tmp_path)
    job = attack_jobs(preset)[0]
    assert list(attacks_on(preset.name, job, tmp_path)) == begun == ["nearest_embedding", "causal_search"]
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        attacks_on(preset.name, job, tmp_path, lambda: True)
    assert begun == ["nearest_embedding"]


# --- the page


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


def attack(**scores: float) -> dict[str, Any]:
    """What an attack's file has; who saw nothing gets a tenth."""
    told = {
        name: {
            "attack": interval(value),
            "floors": {"unrelated": interval(value / 20), "unigram": interval(value / 10)},
        }
        for name, value in scores.items()
    }
    return {"rows": 4, "tokens": 80, "shadow_rows": 6, "steps": [0, 1], "seconds": 1.0, "scores": told, "figures": {}}


def raw_of_attacked(preset: Preset, job: Job, leak: float, **more: Any) -> dict[str, Any]:
    found = {
        "nearest_embedding": attack(token_accuracy=leak, rouge1=leak),
        "causal_search": attack(token_accuracy=leak / 2, rouge1=leak / 2),
        "label_inference": attack(label_accuracy=70.0),
    }
    return raw_of(preset, job, attacks=found, **more)


def some_runs(folder: Path) -> Preset:
    """Seed 0 of three cells."""
    preset = attacking(folder)
    jobs = {job.variant: job for job in attack_jobs(preset, seeds=[0])}
    put(
        folder,
        preset,
        raw_of_attacked(preset, jobs["cut0-none"], 100.0, privacy=None, eval_loss=0.5, main=75.0),
        raw_of_attacked(preset, jobs["cut0-gauss"], 20.0, privacy={"epsilon": 12.34}, eval_loss=2.5),
        raw_of_attacked(preset, jobs["cut1-none"], 60.0, privacy=None),
    )
    return preset


def line_of(page: str, *starts: str) -> list[str]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return next(line for line in cells if line[: len(starts)] == list(starts))


def test_the_page_has_leak_and_cost_side_by_side(tmp_path: Path) -> None:
    preset = some_runs(tmp_path)
    runs = render.runs_of(tmp_path, preset)
    page = render.attack_pages(preset, attacked_rows(preset, runs), runs)["table3-mine.md"]
    assert line_of(page, "0", "none") == [
        "0", "none", "75.0", "0.500", "–", "100.0 (99–101)", "50.0 (49–51)", "70.0 (69–71)", "10.0",
    ]  # fmt: skip
    assert line_of(page, "0", "gauss")[:6] == ["0", "gauss", "50.0", "2.500", "12", "20.0 (19–21)"]
    assert line_of(page, "1", "causal_search") == ["1", "causal_search", "30.0 (3.0)", "30.0 (3.0)", "–"]
    assert line_of(page, "published, ChatGLM-6B", "0")[3] == "28.570"
    assert "13 of 16 runs are missing" in page
    assert "Of the victim: 4 rows, 80 tokens, sent in steps 0 to 1." in page


def test_the_csv_has_every_score_unrounded(tmp_path: Path) -> None:
    preset = some_runs(tmp_path)
    runs = render.runs_of(tmp_path, preset)
    text = render.attack_pages(preset, attacked_rows(preset, runs), runs)["table3-mine.csv"]
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == 3 * 5
    found = next(line for line in lines if line["defence"] == "gauss" and line["attack"] == "nearest_embedding")
    assert (found["score"], found["value"], found["floor_unigram"]) == ("token_accuracy", "20.0", "2.0")
    assert (found["epsilon"], found["run"]) == ("12.34", "tiny-rte-lora-attacked-seed0-cut0-gauss")


def test_the_best_attack_is_what_leaks(tmp_path: Path) -> None:
    preset = some_runs(tmp_path)
    rows = attacked_rows(preset, render.runs_of(tmp_path, preset))
    leaks = {(row.head_blocks, row.defence): row.leak() for row in rows}
    assert {place: (leak[0], leak[1].value) for place, leak in leaks.items() if leak} == {
        (0, "none"): ("nearest_embedding", 100.0),
        (0, "gauss"): ("nearest_embedding", 20.0),
        (1, "none"): ("nearest_embedding", 60.0),
    }
    written = render.render_preset(tmp_path, preset)
    assert {path.name for path in written} == {"table3-mine.md", "table3-mine.csv", "leakage-mine.png"}


# --- what the documentation quotes


def test_the_docs_quote_the_committed_runs() -> None:
    page, preset = (ROOT / PAGE).read_text(encoding="utf-8"), load_preset(PRESET, SHIPPED)
    rows = attacked_rows(preset, render.runs_of(ROOT / "results", preset))
    texts = texts_of(ROOT / "results", rows)
    assert set(texts) == {"table3", "fsha"}
    assert filled_in(page, texts) == page


def test_a_page_without_marks_is_refused() -> None:
    marked = "a\n<!-- measured: x -->\nold\n<!-- end of x -->\nb"
    assert filled_in(marked, {"x": "new"}) == marked.replace("old", "new")
    with pytest.raises(DataError, match="lacks the marks <!-- measured: y -->"):
        filled_in(marked, {"y": "new"})
