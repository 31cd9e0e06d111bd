"""Values that break a rule are refused with the value, the rule and the flag."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc.cli import make_parser, parse, to_yaml, valid_keys
from hpc.config import AdapterConfig, Config, DataConfig, RunConfig, TrainConfig, TrunkConfig
from hpc.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def parsed(*arguments: str) -> Config:
    return parse(make_parser("test"), arguments)[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.max_stps", "3"], ["train.max_stps", "did you mean train.max_steps"]),
        (["--schedule", "serial"], ["schedule", "train.schedule"]),
        (["--train.max_steps", "three"], ["--train.max_steps", "three", "int"]),
        (["--train.schedule", "parallel"], ["--train.schedule", "parallel", "client_batch"]),
        (["--train.clients", "0"], ["--train.clients", "0", "at least 1"]),
        (["--model.head_blocks", "-1"], ["--model.head_blocks", "-1"]),
        (["--train.max_steps", "5", "--train.rounds", "2"], ["--train.max_steps 5", "--train.rounds 2"]),
        (["--train.adam_beta1", "1.5"], ["--train.adam_beta1", "1.5"]),
        (["--adapter.lora_dropout", "1.5"], ["--adapter.lora_dropout", "1.5"]),
        (["--data.task", "boolq"], ["--data.train_file"]),
        (["--data.task", "jsonl", "--data.train_file", "a.jsonl"], ["{client_id}", "--data.partition"]),
        (["--train.schedule", "serial", "--train.aggregation", "gradient"], ["handover or none"]),
        (["--trunk.ranks", "3"], ["--trunk.ranks 3", "--train.clients 2"]),
        (["--run.name", "a/b"], ["--run.name", "a/b"]),
        (["--train.per_client_batch_size", "500"], ["500", "192"]),
        (["--config", "no-such-file.yaml"], ["no-such-file.yaml", "does not exist"]),
    ],
)
def test_bad_values_are_named(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(*arguments)
    message = str(refused.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_an_unknown_key_in_yaml_names_the_nearest(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train:\n  learning_rat: 0.1\n")
    with pytest.raises(ConfigError, match=r"train\.learning_rat; did you mean train\.learning_rate"):
        parsed("--config", str(recipe))


def test_flags_override_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train:\n  clients: 3\n  max_steps: 7\n")
    config = parsed("--config", str(recipe), "--train.max_steps", "9")
    assert (config.train.clients, config.train.max_steps) == (3, 9)


def test_what_a_run_saves_reads_back(tmp_path: Path) -> None:
    parser = make_parser("test")
    config, namespace = parse(
        parser, ["--train.seed", "5", "--adapter.parts", "[head,tail]", "--model.dtype", "bfloat16"]
    )
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(parser, namespace))
    assert parsed("--config", str(saved)) == config


@pytest.mark.parametrize("recipe", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_recipes_are_valid(recipe: Path) -> None:
    parsed("--config", str(recipe))


def test_every_key_has_help() -> None:
    text = " ".join(make_parser("test").format_help().split())
    for key in valid_keys():
        assert f"--{key}" in text
    assert text.count("(type:") >= len(valid_keys())


def test_refusing_a_command_line_imports_no_torch() -> None:
    code = (
        "import sys; from hpc.cli import make_parser, parse; import hpc.preflight, hpc.launcher\n"
        "parse(make_parser('x'), []); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_natural_aggregation() -> None:
    assert TrainConfig(schedule="serial").resolved_aggregation == "handover"
    assert TrainConfig(schedule="client_batch").resolved_aggregation == "gradient"


def test_recomputation_and_prefixes_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="activation_checkpointing"):
        Config(adapter=AdapterConfig(method="p_tuning_v2"), trunk=TrunkConfig(activation_checkpointing=True))


def test_evaluation_needs_held_out_data() -> None:
    assert DataConfig().evaluates
    assert not DataConfig(val_examples=0).evaluates
    assert not DataConfig(task="jsonl", train_file="x-{client_id}.jsonl").evaluates


def test_output_folder() -> None:
    assert RunConfig().folder is None
    assert RunConfig(name="a").folder == "results/runs/a"
    assert RunConfig(name="a", output_dir="b").folder == "b"
