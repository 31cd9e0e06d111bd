"""The preset `paper`: its facts are the paper's, and its runs work on tiny models of the same architectures."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.cli import make_parser, parse, parse_quickly
from hpc.config import Config
from hpc.reproduce.dry_run import Estimator
from hpc.reproduce.methods import METHODS
from hpc.reproduce.plan import Job, cells_of, jobs_of
from hpc.reproduce.preset import load_preset
from hpc.reproduce.run import as_flag
from hpc.reproduce.score import read_lines, score
from hpc.source.resolve import cut_of
from hpc.source.tiny import tiny_llama_folder
from tests.loopback import run_centralised, run_split
from tests.unit.chatglm_folder import write_chatglm
from tests.unit.task_records import RECORDS, write_lines
from tests.unit.test_lost_clients import peers_in

PRESETS = Path(__file__).resolve().parents[2] / "launch" / "presets"
PAPER = load_preset("paper", PRESETS)
CELLS = cells_of(PAPER, list(PAPER.tables), [], [])
JOBS = jobs_of(CELLS)
SUPERGLUE = {"record", "rte", "boolq", "wic", "copa", "wsc", "cb", "multirc"}
TWO_CLASS = {"boolq", "copa", "multirc", "rte", "wic", "wsc"}
CHATGLM, LLAMA = "THUDM/chatglm-6b", "meta-llama/Llama-2-7b-chat-hf"
ROWS = {"zero_shot", "centralised", "serial", "fedbert", "centralised_union", "client_batch", "replica"}
# Table → what it has of each model: tasks, adapters.
TABLES = {
    "table1": {CHATGLM: (SUPERGLUE, {"p_tuning_v2", "lora"})},
    "table2": {CHATGLM: ({"cnn_dailymail", "xsum"}, {"p_tuning_v2", "lora"})},
    "table4": {LLAMA: (TWO_CLASS, {"lora"})},
    "table5": {
        CHATGLM: ({"huatuo"}, {"p_tuning_v2", "lora"}),
        "hfl/chinese-llama-2-7b": ({"huatuo"}, {"lora"}),
    },
}
# Validation sets: Wang et al., 2019 (SuperGLUE); the others' own data cards.
HELD_OUT = {
    "boolq": 3270, "cb": 56, "copa": 100, "multirc": 4848, "record": 10000, "rte": 277, "wic": 638, "wsc": 104,
    "cnn_dailymail": 13368, "xsum": 11332,
}  # fmt: skip


@pytest.fixture(scope="module")
def configs() -> dict[str, Config]:
    """Every run's configuration, checked as the command line checks it; what the hub would say comes from `shapes`."""
    estimator = Estimator(preset=PAPER)
    return {job.name: estimator.config_of(job) for job in JOBS}


@pytest.mark.parametrize("table", sorted(TABLES))
def test_a_table_has_the_papers_models_tasks_and_adapters_in_three_seeds(table: str) -> None:
    cells = [cell for cell in CELLS if cell.table == table]
    assert {cell.job.flags["model.name_or_path"] for cell in cells} == set(TABLES[table])
    for name, (tasks, adapters) in TABLES[table].items():
        mine = [cell for cell in cells if cell.job.flags["model.name_or_path"] == name]
        trained = {(c.task, c.adapter, c.method, c.seed) for c in mine if not c.at_start}
        rows = ROWS - {"zero_shot"}
        assert trained == {(t, a, m, s) for t in tasks for a in adapters for m in rows for s in (0, 1, 2)}
        assert {c.task for c in mine if c.at_start} == tasks, "each task is scored untrained"
        assert all(c.job.flags["adapter.method"] == "lora" for c in mine if c.at_start), "a prefix changes the model"
        assert all(c.job.flags["train.eval_before"] for c in mine if c.at_start)


def test_all_tables_are_checked() -> None:
    assert set(PAPER.tables) == set(TABLES)


def test_every_run_trains_as_the_paper_says(configs: dict[str, Config]) -> None:
    for job in JOBS:
        config = configs[job.name]
        assert config.model.dtype == "float16"
        cut = (config.model.head_blocks, config.model.tail_blocks)
        assert cut == ((0, 0) if job.method == "fedbert" else (1, 1))
        assert config.train.per_client_batch_size == 1
        assert config.train.weight_decay == 0, "Adam"
        assert config.adapter.parts == ["head", "trunk", "tail"]
        if config.adapter.method == "p_tuning_v2":
            assert (config.adapter.num_virtual_tokens, config.train.learning_rate) == (128, 2e-2)
        else:
            assert (config.adapter.method, config.adapter.lora_r, config.adapter.lora_alpha) == ("lora", 8, 16)
        assert config.data.chat_template == (config.model.name_or_path == LLAMA)
        assert config.train.save_every > 0, "a long run goes on where it stopped"


def test_a_trunk_has_26_of_28_blocks_or_30_of_32(configs: dict[str, Config]) -> None:
    """FedBERT's cut leaves all of them to it."""
    blocks = {"chatglm-6b": 28, "llama-2-7b-chat": 32, "chinese-llama-2-7b": 32}
    for job in JOBS:
        shape = dict(PAPER.shapes[job.model])
        trunk = cut_of(configs[job.name].model, shape).part("trunk").blocks
        assert trunk == blocks[job.model] - (0 if job.method == "fedbert" else 2)


@pytest.mark.parametrize("published", ["chatglm/chatglm-6b", "llama-2-7b"])
def test_a_shape_is_the_published_configurations(published: str) -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "golden" / f"{published}.config.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    theirs = json.loads(path.read_text())
    shape = PAPER.shapes["chatglm-6b" if "chatglm" in published else "llama-2-7b-chat"]
    assert shape.items() <= theirs.items()


def test_whole_validation_sets_are_scored(configs: dict[str, Config]) -> None:
    assert dict(PAPER.estimate.held_out) == HELD_OUT
    for job in JOBS:
        data = configs[job.name].data
        if job.task == "huatuo":
            assert (2 * data.max_train_examples, 2 * data.val_examples) == (3000, 300)
        else:
            assert (data.max_train_examples, data.val_examples) == (0, HELD_OUT[job.task])
        summary = job.task in ("cnn_dailymail", "xsum", "huatuo")
        assert data.evaluate_by == ("generation" if summary else "likelihood")
        assert not summary or (data.max_source_length, data.max_target_length) == (512, 128), "640 tokens in all"
        assert data.longest_row + 128 <= 2048, "what ChatGLM-6B was trained for, prefix included"


def test_rows_that_are_compared_see_as_many_batches(configs: dict[str, Config]) -> None:
    for job in JOBS:
        clients_a_step = 1 if METHODS[job.method].by_client else 2
        turns = PAPER.tasks[job.task].batches // 20  # of 10 batches of each of 2 clients; what is left over is left out
        assert configs[job.name].train.max_steps * clients_a_step == 20 * turns


def test_the_quick_parser_reads_as_the_runs_do() -> None:
    parser = make_parser("")
    for job in JOBS[::37]:
        flags = [text for key, value in job.flags.items() for text in (f"--{key}", as_flag(value))]
        flags += ["--data.data_dir", "somewhere"]
        assert parse_quickly(flags) == parse(parser, flags)[0]


# --- every run, on a tiny model of the same architecture ---------------------------------------------------------

INST = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %}"
TEMPLATE = INST + " {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
SHORTER: dict[str, Any] = {
    "model.dtype": "float32",
    "data.max_source_length": 200,
    "data.max_target_length": 12,
    "data.val_examples": 2,
    "train.sync_every": 2,
    "train.save_every": 2,
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model of the preset → a random one of its architecture, with a tokenizer of its kind."""
    llama = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(tiny_llama_folder(seed=0), llama)
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    glm = write_chatglm(tmp_path_factory.mktemp("chatglm"))
    return {"chatglm-6b": glm, "llama-2-7b-chat": llama, "chinese-llama-2-7b": llama}


def shortened(job: Job, model: Path, folder: Path) -> Config:
    """The job as the preset has it, but for the model, lengths and steps, on a few records of its task."""
    for split in ("train", "val"):
        records = [copy.deepcopy(RECORDS[job.task]) for _ in range(4)]
        for number, record in enumerate(records):  # by group, each client has a passage
            if job.task in ("multirc", "record"):
                record["passage"]["text"] += f" No. {number}."
        write_lines(folder / "data" / f"{split}.jsonl", *records)
    steps = 4 if METHODS[job.method].by_client else 2
    flags = {**job.flags, **SHORTER, "model.name_or_path": str(model), "train.max_steps": steps}
    texts = [text for key, value in flags.items() for text in (f"--{key}", as_flag(value))]
    return parse_quickly([*texts, "--data.data_dir", str(folder / "data")])


def distinct(tasks: tuple[str, ...]) -> Iterator[Any]:
    """Each model and adapter on its task with labels or on that with texts; `make test LONG=1` does both."""
    for model, adapter in dict.fromkeys((job.model, job.adapter) for job in JOBS):
        mine = [task for task in tasks if any((j.model, j.task) == (model, task) for j in JOBS)]
        first = {"lora": mine[0], "p_tuning_v2": mine[-1]}[adapter]
        for task in mine:
            marks = [] if task == first else [pytest.mark.long]
            yield pytest.param(model, adapter, task, marks=marks, id=f"{model}-{adapter}-{task}")


def trained(job: Job, stand_ins: dict[str, Path], folder: Path, keys: Path) -> tuple[Any, Config]:
    folder.mkdir()
    config = shortened(job, stand_ins[job.model], folder)
    if config.train.schedule == "centralised":
        return run_centralised(replace(config, run=replace(config.run, save_adapter=False)), folder), config
    return run_split(config, folder, peers=peers_in(keys)), config


def scored(folder: Path, config: Config) -> dict[str, float]:
    steps = config.train.max_steps
    paths = sorted((folder / "roles").glob(f"*/predictions-{steps}-client-*.jsonl"), key=lambda path: path.name)
    return score([line for path in paths for line in read_lines(path)], config).metrics


@pytest.mark.parametrize(("model", "adapter", "task"), list(distinct(("rte", "huatuo"))))
def test_every_row_runs_on_a_tiny_model_of_the_same_architecture(
    model: str, adapter: str, task: str, stand_ins: dict[str, Path], tmp_path: Path, pristine_keys: Path
) -> None:
    """All rows of a table: what computes the same function gives the same losses and scores."""
    losses, metrics = {}, {}
    for job in JOBS:
        if (job.model, job.adapter, job.task, job.seed) == (model, adapter, task, 0):
            outcome, config = trained(job, stand_ins, tmp_path / job.method, pristine_keys)
            losses[job.method], metrics[job.method] = outcome.losses, scored(tmp_path / job.method, config)
    assert set(losses) == ROWS - {"zero_shot"}
    assert losses["serial"] == losses["fedbert"] == losses["centralised"]
    assert metrics["serial"] == metrics["fedbert"] == metrics["centralised"]
    assert losses["client_batch"] == pytest.approx(losses["centralised_union"], rel=1e-4)
    assert metrics["client_batch"] == metrics["centralised_union"]
    assert len(losses["replica"]) == 2
    assert losses["replica"][0] == pytest.approx(losses["client_batch"][0], rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("task", sorted(PAPER.tasks))
def test_every_task_runs(task: str, stand_ins: dict[str, Path], tmp_path: Path, pristine_keys: Path) -> None:
    job = next(job for job in JOBS if (job.task, job.method) == (task, "serial"))
    outcome, config = trained(job, stand_ins, tmp_path / "run", pristine_keys)
    assert len(outcome.losses) == 4
    assert scored(tmp_path / "run", config)
