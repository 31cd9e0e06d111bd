"""From a preset to runs: each is there once, earliest seeds first, and the methods of a task can be compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.cli import make_parser, parse
from hpc.config import AdapterConfig, Config, ModelConfig
from hpc.errors import ConfigError
from hpc.model.build import ModelBuilder
from hpc.reproduce.methods import METHODS
from hpc.reproduce.plan import Cell, Job, cells_of, jobs_of, tuning_jobs
from hpc.reproduce.preset import Block, Preset, TaskPlan, load_preset
from hpc.reproduce.run import Bench
from tests.unit.preset_case import ROOT, SHIPPED, preset_of
from tests.unit.task_records import RECORDS, write_lines

TABLES = ["table1", "table4"]


@pytest.fixture
def preset(tmp_path: Path) -> Preset:
    return preset_of(tmp_path)


def key(cell: Cell) -> tuple[Any, ...]:
    return (cell.table, cell.task, cell.adapter, cell.method, cell.seed)


def test_a_table_has_a_cell_for_each_task_adapter_method_and_seed(preset: Preset) -> None:
    cells = cells_of(preset, TABLES, [], [])
    trained = METHODS.keys()
    expected = {
        *(
            ("table1", "rte", adapter, method, seed)
            for adapter in ("prefix", "lora")
            for method in trained
            for seed in (0, 1)
        ),
        *(("table1", "copa", adapter, method, 3) for adapter in ("prefix", "lora") for method in trained),
        *(("table4", "rte", "lora", "centralised", seed) for seed in (0, 1)),
        ("table1", "rte", "none", "zero_shot", 0),
        ("table1", "copa", "none", "zero_shot", 3),
        ("table4", "rte", "none", "zero_shot", 0),
    }
    assert Counter(map(key, cells)) == Counter(expected)


def test_each_tasks_first_seed_comes_first_and_else_the_presets_order_stays(preset: Preset) -> None:
    cells = cells_of(preset, TABLES, [], [])
    order = list(dict.fromkeys((cell.table, cell.task, cell.adapter, cell.seed) for cell in cells if not cell.at_start))
    assert order == [
        ("table1", "rte", "prefix", 0),
        ("table1", "rte", "lora", 0),
        ("table1", "copa", "prefix", 3),
        ("table1", "copa", "lora", 3),
        ("table4", "rte", "lora", 0),
        ("table1", "rte", "prefix", 1),
        ("table1", "rte", "lora", 1),
        ("table4", "rte", "lora", 1),
    ]


def test_a_cell_is_there_once_whoever_asks_for_it_twice(tmp_path: Path) -> None:
    block = {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": ["zero_shot", "centralised"]}
    preset = preset_of(tmp_path, tables={"table1": [block, {**block, "methods": ["centralised", "serial"]}]})
    cells = cells_of(preset, ["table1"], [], [0, 0])
    assert sorted(cell.method for cell in cells) == ["centralised", "serial", "zero_shot"]


def test_tables_share_their_runs(preset: Preset) -> None:
    both, first = (jobs_of(cells_of(preset, tables, [], [])) for tables in (TABLES, TABLES[:1]))
    assert both == first
    assert len({job.name for job in both}) == len(both) == 2 * 6 * (2 + 1)


def test_a_zero_shot_number_is_of_a_run_that_starts_as_the_published_model(preset: Preset) -> None:
    zero = [cell for cell in cells_of(preset, TABLES, [], []) if cell.method == "zero_shot"]
    for cell in zero:
        assert cell.at_start
        assert (cell.job.adapter, cell.job.method) == ("lora", "centralised")
        assert cell.job.flags["train.eval_before"] is True
    others = [cell.job for cell in cells_of(preset, TABLES, [], []) if cell.job not in [each.job for each in zero]]
    assert others
    assert not any(job.flags["train.eval_before"] for job in others)


@pytest.mark.parametrize(("method", "same"), [("lora", True), ("full", True), ("p_tuning_v2", False)])
def test_only_some_adapters_leave_the_model_as_it_is(tmp_path: Path, method: Any, same: bool) -> None:
    """The rule that zero-shot numbers rest on: the model with the adapter against the model without."""
    model = ModelConfig(name_or_path="tiny-llama")
    builder = ModelBuilder.of(Config(model=model, adapter=AdapterConfig(method=method, num_virtual_tokens=4)))
    ids_BT = torch.arange(12).reshape(2, 6)
    logits = [builder.part("whole", adapted=adapted).eval()(ids_BT) for adapted in (False, True)]
    assert torch.equal(*logits) is same
    adapters = {"it": {"adapter.method": method}}
    block = {"model": "tiny", "adapters": ["it"], "tasks": ["rte"], "methods": ["zero_shot", "centralised"]}
    preset = preset_of(tmp_path, adapters=adapters, tables={"table1": [block]})
    if same:
        assert [cell.method for cell in cells_of(preset, ["table1"], [], [])].count("zero_shot") == 1
    else:
        with pytest.raises(ConfigError, match=r"table1 has zero_shot, but each adapter \(it\) changes the model"):
            cells_of(preset, ["table1"], [], [])


def test_rows_that_are_compared_have_their_reference_beside_them(preset: Preset) -> None:
    cells = {key(cell) for cell in cells_of(preset, TABLES, [], [])}
    compared = [each for each in cells if each[3] in METHODS and METHODS[each[3]].reference]
    assert compared
    for table, task, adapter, method, seed in compared:
        assert (table, task, adapter, METHODS[method].reference, seed) in cells


def test_a_row_that_differs_nowhere_has_its_references_settings_but_the_schedule(preset: Preset) -> None:
    jobs = {job.name: job for job in jobs_of(cells_of(preset, ["table1"], [], []))}
    ways = {"train.schedule", "train.order", "train.eval_before", "model.head_blocks", "model.tail_blocks"}
    for job in jobs.values():
        reference = METHODS[job.method].reference
        if reference:
            other = jobs[job.name.replace(f"-{job.method}-", f"-{reference}-")]
            for flag in (job.flags.keys() | other.flags.keys()) - ways:
                assert job.flags.get(flag) == other.flags.get(flag), (job.name, flag)


def plan(batches: int, clients: int, seeds: list[int]) -> Preset:
    return Preset(
        name="made up",
        scale="",
        seeds=tuple(seeds),
        common={"train.clients": clients, "train.per_client_batch_size": 3},
        models={"tiny": {}},
        adapters={"lora": {}},
        tasks={"rte": TaskPlan(batches=batches, seeds=tuple(seeds), folder="rte")},
        tables={"table1": (Block(model="tiny", adapters=("lora",), tasks=("rte",), methods=("zero_shot", *METHODS)),)},
    )


@given(st.integers(1, 9), st.integers(1, 60), st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True))
@settings(max_examples=60, deadline=None)
def test_all_methods_learn_from_as_many_examples_of_each_client(clients: int, batches: int, seeds: list[int]) -> None:
    preset = plan(batches, clients, seeds)
    if batches < clients:
        with pytest.raises(ConfigError, match=f"tasks.rte.batches is {batches}, less than one"):
            cells_of(preset, ["table1"], [], [])
        return
    jobs = jobs_of(cells_of(preset, ["table1"], [], []))
    assert Counter((job.method, job.seed) for job in jobs) == Counter((m, s) for m in METHODS for s in seeds)
    # `serial` and `centralised` in sequence take one client's batch a step, the others one of every client.
    in_turn = {"serial", "fedbert", "centralised"}
    seen = {job.flags["train.max_steps"] * (1 if job.method in in_turn else clients) for job in jobs}
    assert seen == {batches - batches % clients}


def test_a_fingerprint_is_of_all_settings_and_of_nothing_else(preset: Preset, tmp_path: Path) -> None:
    job = jobs_of(cells_of(preset, ["table4"], [], []))[0]
    changed = [{**job.flags, flag: "another"} for flag in job.flags]
    changed += [{**job.flags, "data.alpha": 0.1}, {**job.flags, "train.learning_rate": 0.1}]
    others = [Job(**{**vars(job), "flags": flags}) for flags in changed] + [Job(**{**vars(job), "tuning": True})]
    assert job.fingerprint not in {other.fingerprint for other in others}
    assert len({other.fingerprint for other in others[:-1]}) == len(changed)
    again = dict(reversed(list(job.flags.items())))
    assert Job(**{**vars(job), "flags": again}).fingerprint == job.fingerprint
    moved = preset_of(tmp_path, tasks={"rte": {"batches": 7, "folder": "elsewhere"}, "copa": {"batches": 4}})
    assert jobs_of(cells_of(moved, ["table4"], [], []))[0].fingerprint == job.fingerprint


def test_tasks_and_seeds_can_be_chosen(preset: Preset) -> None:
    cells = cells_of(preset, TABLES, ["copa"], [])
    assert {(cell.table, cell.task, cell.seed) for cell in cells} == {("table1", "copa", 3)}
    cells = cells_of(preset, ["table1"], ["rte"], [8, 1])
    assert {cell.seed for cell in cells} == {1, 8}
    assert all(cell.job.flags["train.seed"] == cell.seed for cell in cells)
    with pytest.raises(ConfigError, match="--tasks wic is not in table4; choose of rte"):
        cells_of(preset, ["table4"], ["rte", "wic"], [])
    with pytest.raises(ConfigError, match="--preset mine has no table5; it has table1, table4"):
        cells_of(preset, ["table5"], [], [])


def test_what_is_run_for_a_seed_does_not_depend_on_what_else_is_asked_for(preset: Preset) -> None:
    whole = {job.name: job for job in jobs_of(cells_of(preset, TABLES, [], []))}
    for some in (cells_of(preset, ["table4"], [], [1]), cells_of(preset, ["table1"], ["rte"], [0])):
        assert all(whole[job.name] == job for job in jobs_of(some))


def test_learning_rates_are_tried_without_the_held_out_data(tmp_path: Path) -> None:
    tuning = {"model": "tiny", "tasks": ["rte"], "rates": {"lora": [1.0e-3, 3.0e-3], "prefix": [0.01]}}
    jobs = tuning_jobs(preset_of(tmp_path, tuning=tuning))
    rates = [(job.adapter, job.flags["train.learning_rate"]) for job in jobs]
    assert rates == [("lora", 0.001), ("lora", 0.003), ("prefix", 0.01)]
    assert len({job.name for job in jobs}) == 3
    assert all(job.tuning and job.method == "centralised" for job in jobs)
    assert tuning_jobs(preset_of(tmp_path, tuning=tuning), ["rte"]) == jobs
    with pytest.raises(ConfigError, match="--tasks copa is not tuned; choose of rte"):
        tuning_jobs(preset_of(tmp_path, tuning=tuning), ["copa"])
    with pytest.raises(ConfigError, match="tries no learning rates"):
        tuning_jobs(preset_of(tmp_path))
    # Held out is the data set's own held-out part; what chooses a rate is a part of what is learnt from.
    lines = [{**RECORDS["rte"], "idx": number, "premise": f"Ada\u2028sells {number}."} for number in range(11)]
    source = write_lines(tmp_path / "data" / "superglue" / "RTE" / "train.jsonl", *lines)
    write_lines(source.with_name("val.jsonl"), RECORDS["rte"])
    bench = Bench(root=ROOT, results=tmp_path, data_dir=tmp_path / "data", preset=preset_of(tmp_path, tuning=tuning))
    flags = bench._flags(jobs[0])
    parts = [Path(flags[flags.index(f"--data.{name}_file") + 1]) for name in ("train", "val")]
    learnt, chosen = (part.read_text(encoding="utf-8").split("\n")[:-1] for part in parts)
    assert sorted(learnt + chosen) == sorted(source.read_text(encoding="utf-8").split("\n"))
    assert (len(learnt), len(chosen)) == (8, 3)


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_every_run_of_a_shipped_preset_is_a_configuration(name: str, tmp_path: Path) -> None:
    preset = load_preset(name, SHIPPED)
    for plan in preset.tasks.values():
        write_lines(tmp_path / plan.folder / "train.jsonl", *[{}] * 5)
    bench = Bench(root=ROOT, results=tmp_path / "results", data_dir=tmp_path, preset=preset)
    jobs = jobs_of(cells_of(preset, list(preset.tables), [], [])) + (tuning_jobs(preset) if preset.tuning else [])
    # Settings come from four places that know nothing of each other: each pair of two of them once is enough.
    chosen = {(job.model, job.adapter, job.method): job for job in jobs} | {(job.task, job.tuning): job for job in jobs}
    parser = make_parser("")
    for job in {job.name: job for job in chosen.values()}.values():
        config, _ = parse(parser, bench._flags(job))
        assert (config.data.task, config.train.seed) == (job.task, job.seed)
        assert config.train.max_steps == job.flags["train.max_steps"]
        assert config.data.save_predictions
        assert config.model.name_or_path == preset.models[job.model]["model.name_or_path"]


@pytest.mark.parametrize("key", ["train.seed", "train.max_steps", "train.schedule", "train.clients_per_round"])
def test_what_the_plan_says_itself_is_no_flag(key: str, tmp_path: Path) -> None:
    preset = preset_of(tmp_path, common={"train.clients": 2, key: 1})
    with pytest.raises(ConfigError, match=f"--preset mine: {key} is not for flags"):
        cells_of(preset, ["table1"], [], [])


def test_turns_are_whole(tmp_path: Path) -> None:
    block = {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": list(METHODS)}

    def preset(batches: int) -> Preset:
        tasks = {"rte": {"batches": batches}}
        common = {"train.clients": 2, "train.sync_every": 3}
        return preset_of(tmp_path, common=common, tasks=tasks, tables={"table1": [block]})

    steps = {job.method: job.flags["train.max_steps"] for job in jobs_of(cells_of(preset(19), ["table1"], [], [0]))}
    assert (steps["serial"], steps["client_batch"]) == (18, 9)
    with pytest.raises(ConfigError, match=r"batches is 5, less than one turn of 3 .* for each of 2 clients"):
        cells_of(preset(5), ["table1"], [], [])
