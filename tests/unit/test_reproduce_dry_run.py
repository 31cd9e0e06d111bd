"""`--dry_run` of the tables: its estimates against real runs, hand computation and published numbers."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers.utils

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.errors import ConfigError, ModelError
from hpc.model.build import ModelBuilder
from hpc.model.estimate import bytes_of, role_bytes, role_weights
from hpc.model.pretrained import config_of_shape, load_tokenizer
from hpc.report.events import read_events, role_path
from hpc.reproduce.assumptions import Assumptions
from hpc.reproduce.estimate import (
    ModelSize,
    averages,
    evaluated_tokens,
    evaluations,
    hand_overs,
    run_flops,
    run_link_bytes,
    run_seconds,
    step_link_bytes,
)
from hpc.reproduce.every_cell import every_table, table_cells
from hpc.reproduce.plan import cells_of, jobs_of
from hpc.reproduce.preset import load_preset
from hpc.schedule import HandOver, Sync, TrainStep, instructions
from hpc.source.cut import Cut
from tests.loopback import run_split
from tests.unit.reproduce_case import put, raw_of
from tests.unit.test_lost_clients import peers_in

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "launch" / "presets"
PAPER = load_preset("paper", PRESETS)
GLM = ModelSize(hidden_size=4096, value_bytes=2, block_values=28 * 201_379_840, client_learning=2 * 128 * 2 * 4096)


def config_of(**groups: Any) -> Config:
    """A run of the paper's on summaries: 512 and 128 tokens, one row a batch."""
    data = {"task": "xsum", "data_dir": "x", "partition": "iid", "max_source_length": 512, "max_target_length": 128}
    train = {
        "schedule": "serial",
        "clients": 2,
        "per_client_batch_size": 1,
        "max_steps": 100,
        **groups.pop("train", {}),
    }
    return Config(
        model=ModelConfig(name_or_path="tiny-llama", **groups.pop("model", {})),
        adapter=AdapterConfig(method="p_tuning_v2"),
        data=DataConfig(**{**data, **groups.pop("data", {})}),
        train=TrainConfig(**train),
    )


@pytest.mark.parametrize(("schedule", "blocks"), [("serial", 1), ("serial", 0), ("client_batch", 1), ("replica", 1)])
def test_a_steps_bytes_are_those_that_a_run_sends(
    schedule: Any, blocks: int, tmp_path: Path, pristine_keys: Path
) -> None:
    """Rows as wide as their batch: padding travels, too."""
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama", head_blocks=blocks, tail_blocks=blocks),
        data=DataConfig(train_examples=8, val_examples=0),
        train=TrainConfig(schedule=schedule, clients=2, max_steps=3, per_client_batch_size=1),
    )
    outcome = run_split(config, tmp_path, peers=peers_in(pristine_keys))
    tokenizer = load_tokenizer(ModelBuilder.of(config).resolver)
    data = [load_client_data(config, client, tokenizer) for client in range(2)]
    learning = sum(p.numel() for p in outcome.clients[0].learner.parameters.values())
    size = ModelSize(hidden_size=64, value_bytes=4, block_values=0, client_learning=learning)
    steps = [order for order in instructions(config.train, evaluate=False) if isinstance(order, TrainStep)]
    tokens = [sum(data[c].train_batch(order.batch_of(c)).ids_BT.numel() for c in order.clients) for order in steps]
    sent = [e["bytes"]["payload"] for e in read_events(role_path(tmp_path, "trunk-0")) if e["event"] == "step"]
    expected = [step_link_bytes(config, size, count) for count in tokens]
    # Where the trunk reads ahead, a client that is early has its next rows counted to the step before.
    assert sum(sent) == sum(expected) if config.train.reads_ahead else sent == expected


def test_640_tokens_of_chatglm_are_the_papers_21_mb_a_step() -> None:
    assert step_link_bytes(config_of(model={"dtype": "float16"}), GLM) == 4 * 640 * 4096 * 2
    assert round(step_link_bytes(config_of(), GLM) / 1e6) == 21


def test_a_runs_bytes_by_hand() -> None:
    """10 steps in turns of 4, so 2 hand-overs and one at the end; 6 held-out texts, decoded, before and after."""
    config = config_of(train={"max_steps": 10, "sync_every": 4}, data={"val_examples": 3, "evaluate_by": "generation"})
    size = ModelSize(hidden_size=10, value_bytes=2, block_values=0, client_learning=7)
    steps, scoring, shared = 10 * 4 * 640 * 10 * 2, 2 * (2 * 6) * 640 * (2 * 10 * 2), 3 * 2 * (3 * 7 * 4)
    assert run_link_bytes(config, size, Assumptions()) == steps + scoring + shared
    assert run_link_bytes(config_of(train={"schedule": "centralised"}), size, Assumptions()) == 0


@pytest.mark.parametrize("schedule", ["serial", "client_batch", "replica"])
@pytest.mark.parametrize(("clients", "steps", "every"), [(2, 10, 1), (2, 10, 4), (3, 12, 4), (1, 5, 2)])
def test_hand_overs_and_averages_are_the_schedules(schedule: Any, clients: int, steps: int, every: int) -> None:
    config = config_of(train={"schedule": schedule, "clients": clients, "max_steps": steps, "sync_every": every})
    orders = list(instructions(config.train, evaluate=True))
    assert hand_overs(config) == sum(len(order.receivers) for order in orders if isinstance(order, HandOver))
    assert averages(config) == Counter(type(order) for order in orders)[Sync]


def test_time_is_4_operations_for_each_parameter_and_token_and_2_where_it_is_scored() -> None:
    config = config_of(data={"val_examples": 5}, train={"max_steps": 3, "eval_before": False})
    assumed = Assumptions(tflops=2.0, start_s=7.0, held_out={"xsum": 8})
    size = ModelSize(hidden_size=1, value_bytes=2, block_values=1000, client_learning=0)
    assert run_flops(config, size, assumed) == 3 * 640 * 4 * 1000 + 8 * 640 * 2 * 1000
    assert run_seconds(config, size, assumed) == 7 + run_flops(config, size, assumed) / 2e12


def test_scoring_counts_candidates_and_decoded_texts() -> None:
    assumed = Assumptions(held_out={"record": 3}, candidates=10)
    length = {"max_source_length": 90, "max_target_length": 10}
    record = config_of(data={"task": "record", "val_examples": 50, **length})
    decoded = config_of(data={"val_examples": 4, "evaluate_by": "generation", **length})
    assert evaluated_tokens(record, assumed) == 3 * 10 * 100
    assert evaluated_tokens(decoded, assumed) == 2 * 4 * 2 * 100
    assert evaluations(config_of(train={"max_steps": 10, "eval_every": 5})) == 3
    assert evaluations(config_of(data={"val_examples": 0})) == 0


def glm_values() -> int:
    """ChatGLM-6B's by hand: two embeddings, 28 blocks of attention, feed-forward and two norms, with biases; a norm."""
    hidden, inner, blocks, vocabulary = 4096, 16384, 28, 130528
    attention = hidden * 3 * hidden + 3 * hidden + hidden * hidden + hidden
    feed_forward = hidden * inner + inner + inner * hidden + hidden
    return 2 * vocabulary * hidden + blocks * (attention + feed_forward + 4 * hidden) + 2 * hidden


# Llama-2-7B: bytes of its published shards (model.safetensors.index.json), less the 32 rotary tables in them.
VALUES = {"chatglm-6b": glm_values(), "llama-2-7b-chat": (13_476_835_328 - 32 * 64 * 2) // 2}


@pytest.mark.parametrize("name", sorted(VALUES))
def test_memory_of_a_shape_is_that_of_the_published_weights(name: str) -> None:
    shape = PAPER.shapes[name]
    cut = Cut(blocks=shape.get("num_layers") or shape["num_hidden_layers"], head_blocks=1, tail_blocks=1)
    config = config_of(model={"dtype": "float16"})
    parts = role_weights(config, config_of_shape(shape), cut)
    assert sum(part.frozen_bytes for part in parts.values()) == 2 * VALUES[name]
    assert parts["client"].learning == 2 * 128 * 2 * 4096, "the prefix of two blocks"
    assert parts["trunk"].learning == (cut.blocks - 2) * 128 * 2 * 4096
    # An A100 has 40 GB. Activations of the uncut model in training: Korthikanti et al., 2022, eq. 1 (float16).
    tokens, heads = 2 * 784, 32
    activations = cut.blocks * tokens * 4096 * (34 + 5 * heads * (784 + 128) / 4096)
    assert sum(bytes_of(kind, each, config) for kind, each in parts.items()) + activations < 40e9


@pytest.mark.parametrize(
    ("name", "method"), [("tiny-llama", "lora"), ("tiny-llama", "p_tuning_v2"), ("smollm2-135m", "p_tuning_v2")]
)
def test_the_uncut_model_holds_what_trunk_and_client_hold(name: str, method: Any) -> None:
    """Also where LM head and embedding are one tensor."""
    model, adapter = ModelConfig(name_or_path=name), AdapterConfig(method=method)
    whole = role_bytes(Config(model=model, adapter=adapter, train=TrainConfig(schedule="centralised")))
    assert whole["centralised"] == sum(role_bytes(Config(model=model, adapter=adapter)).values())


# --- the command -----------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """launch/reproduce.py on a machine without the hub."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "launch" / "reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(transformers.utils, "cached_file", unreachable)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return module


@pytest.mark.parametrize("what", ["table5", pytest.param("all", marks=pytest.mark.long)])
def test_the_papers_runs_are_listed_without_data_hub_or_a_trace(
    script: ModuleType, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them is done already: with the same settings, or it is none."""
    jobs = jobs_of(cells_of(PAPER, ["table5"], [], []))
    for job, fingerprint in ((jobs[0], jobs[0].fingerprint), (jobs[1], "of other settings")):
        put(tmp_path, PAPER, raw_of(PAPER, job, fingerprint=fingerprint))
    before = sorted(tmp_path.rglob("*"))
    flags = ["--preset", "paper", "--data_dir", str(tmp_path / "none"), "--results_dir", str(tmp_path), "--dry_run"]
    assert script.main([what, *flags]) == 0
    out = capsys.readouterr().out
    lines = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| table")][1:]
    named = [[cell.strip() for cell in line] for line in lines]
    everything = jobs_of(table_cells(PAPER, every_table(PAPER) if what == "all" else [what], [], []))
    listed = {(model, task, adapter, method) for _, model, task, adapter, method, *_ in named}
    assert len(named) == len(listed)
    assert listed == {(job.model, job.task, job.adapter, f"{job.method} {job.variant}".strip()) for job in everything}
    assert all(line[5] == "0 1 2" for line in named)
    assert sum(int(line[6].partition("/")[0]) for line in named) == 1
    assert f"{len(everything)} runs, 1 done already; left: {len(everything) - 1} runs" in out
    assert " 20.97 |" in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("what", ["all", "tune"])
def test_other_presets_are_listed_too(
    script: ModuleType, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = "smoke" if what == "all" else "small"
    assert script.main([what, "--preset", preset, "--results_dir", str(tmp_path), "--dry_run"]) == 0
    assert "0 done already" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_preset_in_the_docs_is_whole(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "my.yaml").write_text(example.replace("some-folder/my-llama", "tiny-llama"))
    flags = ["--preset", str(tmp_path / "my.yaml"), "--results_dir", str(tmp_path / "results"), "--dry_run"]
    assert script.main(["all", *flags]) == 0
    assert "6 runs, 0 done already" in capsys.readouterr().out


def changed(tmp_path: Path, **changes: Any) -> str:
    """The smoke preset with other sections."""
    import yaml

    content = yaml.safe_load((PRESETS / "smoke.yaml").read_text()) | changes
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        (
            {"common": {"data.partition": "iid", "train.clinets": 2}},
            ConfigError,
            "unknown key train.clinets; did you mean train.clients",
        ),
        ({"common": {"data.partition": "iid", "train.clients": 0}}, ConfigError, "train.clients is 0"),
        ({"common": {"data.partition": "iid", "trunk.ranks": 3}}, ConfigError, "--trunk.ranks 3 exceeds"),
        ({"shapes": {"tiny-llama": {"model_type": "llama", "num_hidden_layers": 2}}}, ConfigError, "leave no trunk"),
        ({"shapes": {"tiny-llama": {"model_type": "lama", "num_hidden_layers": 9}}}, ModelError, "not the shape"),
        ({"shapes": {"other": {}}}, ConfigError, "'other' is not one of tiny-llama"),
        ({"estimate": {"tflop": 1}}, ConfigError, "unknown key 'tflop'; did you mean tflops"),
        ({"estimate": {"tflops": 0}}, ConfigError, "estimate.tflops is 0; it must be a number above 0"),
        ({"estimate": {"held_out": {"rte": "all"}}}, ConfigError, "estimate.held_out.rte is 'all'"),
        ({"models": {"tiny-llama": {"model.name_or_path": "some/model"}}}, ModelError, "in the preset's shapes"),
    ],
)
def test_what_a_run_would_refuse_the_list_refuses(
    changes: dict[str, Any], error: type[Exception], said: str, script: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        script.main(["all", "--preset", changed(tmp_path, **changes), "--results_dir", str(tmp_path), "--dry_run"])
