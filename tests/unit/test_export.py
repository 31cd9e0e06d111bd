"""What a run leaves is loaded by plain PEFT and transformers, and computes what the run's own parts compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpc.errors import ConfigError
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from tests.export_case import (
    ADAPTERS,
    IDS_BT,
    assert_equal_logits,
    export_to,
    finished_runs,
    load,
    logits_of,
    own_logits,
    peft_logits,
    save_config,
    tiny,
)
from tests.loopback import run_centralised, run_split
from tests.unit.test_lost_clients import dies_before, peers_in
from tests.unit.test_wire import Tap

PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", "export.json"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IN_PEFT = [name for name in ADAPTERS if name not in ("full", "some prefixes")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finished_runs(tmp_path_factory.mktemp)


@pytest.mark.parametrize("name", IN_PEFT)
def test_plain_peft_computes_what_the_split_model_computes(name: str, runs: Any) -> None:
    config, outcome, run = runs(name)
    assert_equal_logits(peft_logits(run / "adapter" / "client-0"), own_logits(config, outcome))


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "replica", "aggregation": "none"},
        {"schedule": "replica", "sync_every": 2},
        {"schedule": "serial", "aggregation": "none", "sync_every": 1},
        {"schedule": "pipelined", "aggregation": "none"},
    ],
    ids=str,
)
def test_every_client_gets_its_own(train: dict[str, Any], tmp_path: Path) -> None:
    config = tiny("p_tuning_v2" if train["schedule"] == "replica" else "lora", **train)
    outcome = run_split(config, tmp_path)
    found = [peft_logits(tmp_path / "adapter" / f"client-{client}") for client in range(2)]
    for client in range(2):
        assert_equal_logits(found[client], own_logits(config, outcome, client))
    averaged = config.train.resolved_aggregation == "fedavg"
    assert torch.equal(*found) == averaged


def test_where_parts_are_handed_on_all_end_with_the_same(pristine_keys: Path, tmp_path: Path) -> None:
    config = tiny("lora", schedule="serial", save_every=2)
    outcome = run_split(config, tmp_path, peers=peers_in(pristine_keys))
    for client in range(2):
        assert_equal_logits(peft_logits(tmp_path / "adapter" / f"client-{client}"), own_logits(config, outcome))
    save_config(config, tmp_path)  # the checkpoint was written before the last hand-over: client 1 has the newest
    found = export_to(tmp_path, tmp_path / "out", checkpoint="checkpoint-2")
    assert_equal_logits(peft_logits(found), own_logits(config, outcome))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_partitioned_trunk_is_gathered(stage: int, runs: Any, tmp_path: Path) -> None:
    config, outcome, _ = runs("p_tuning_v2, projection")
    run_split(tiny("p_tuning_v2, projection", stage=stage), tmp_path)
    assert_equal_logits(peft_logits(tmp_path / "adapter" / "client-0"), own_logits(config, outcome), atol=1e-4)


def test_the_baseline_leaves_its_own(tmp_path: Path) -> None:
    config = tiny("p_tuning_v2, projection", schedule="centralised")
    whole = ModelBuilder.of(config).part("whole").eval()
    outcome = run_centralised(config, tmp_path)
    whole.load_trainable({f"parameter/{name}": value for name, value in outcome.trained.items()})
    with torch.no_grad():
        assert_equal_logits(peft_logits(tmp_path / "adapter" / "centralised"), whole(IDS_BT))
    assert_equal_logits(peft_logits(export_to(tmp_path, tmp_path / "out")), whole(IDS_BT).detach())
    save_config(config, tmp_path)
    with pytest.raises(ConfigError, match="leave --client out"):
        export_to(tmp_path, tmp_path / "again", client=0)


@pytest.mark.parametrize("name", ["lora", "lora, trunk only", "full"])
def test_merged_into_a_whole_model(name: str, runs: Any, tmp_path: Path) -> None:
    config, outcome, run = runs(name)
    merged = export_to(run, tmp_path / "whole", merge=True)
    assert_equal_logits(logits_of(load(merged)), own_logits(config, outcome), atol=1e-5)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(merged)("a").input_ids
    assert not (merged / "adapter_config.json").exists()


def test_merged_in_another_precision(runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    tensors = load_file(export_to(run, tmp_path / "m", merge=True, dtype="bfloat16") / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["lora", "p_tuning_v2, projection"])
def test_out_of_a_checkpoint(name: str, runs: Any, tmp_path: Path) -> None:
    config, outcome, run = runs(name)
    found = export_to(run, tmp_path / "out", checkpoint="checkpoint-2", client=1)
    assert_equal_logits(peft_logits(found), own_logits(config, outcome, 1))


def test_out_of_a_checkpoint_of_replicas(tmp_path: Path) -> None:
    config = tiny("lora", schedule="replica", aggregation="none", sync_every=5, save_every=2)
    outcome = run_split(config, tmp_path)
    save_config(config, tmp_path)
    found = export_to(tmp_path, tmp_path / "out", checkpoint="checkpoint-2", client=1)
    assert_equal_logits(peft_logits(found), own_logits(config, outcome, 1))


def test_which_client_is_chosen_and_that_they_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_split(tiny("lora", aggregation="none"), tmp_path)
    chosen = {client: export_to(tmp_path, tmp_path / f"out{client}", client=client) for client in (None, 0, 1)}
    read = {client: (path / "adapter_model.safetensors").read_bytes() for client, path in chosen.items()}
    assert read[None] == read[0] != read[1]
    assert [record.message for record in caplog.records if "differ" in record.message] == [
        "the clients' adapters differ; this is that of client-0, --client chooses another"
    ]


def test_files_are_the_owners_and_nothing_else_is_left(runs: Any) -> None:
    _, _, run = runs("lora")
    assert {path.name for path in (run / "adapter").iterdir()} == {"client-0", "client-1"}
    files = list((run / "adapter" / "client-0").iterdir())
    assert {path.name for path in files} == PEFT_FILES
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    settings = json.loads((run / "adapter" / "client-0" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "tiny-llama"
    assert sorted(settings["target_modules"]) == sorted(TARGETS)


def test_the_clients_send_nothing_for_it(tmp_path: Path) -> None:
    """Byte for byte what they send without it; the trunk's values go the other way."""
    sent: dict[tuple[bool, str], bytes] = {}
    for save in (True, False):
        ends: list[list[bytes]] = []
        config = tiny("lora", save=save, encryption="off", clients=1)

        def tapped(transport: Any, ends: list[list[bytes]] = ends) -> Tap:
            ends.append([])
            return Tap(transport, ends[-1])

        outcome = run_split(config, tmp_path / str(save), wrap=tapped)
        sent[save, "client"], sent[save, "trunk"] = map(b"".join, ends)
    learned = next(value for name, value in outcome.trained.items() if "layers.1" in name and "lora_B" in name)
    assert sent[True, "client"] == sent[False, "client"]
    assert learned.numpy().tobytes() in sent[True, "trunk"]
    assert learned.numpy().tobytes() not in sent[False, "trunk"]
    assert not (tmp_path / "False" / "adapter").exists()


def test_a_lost_client_leaves_none(tmp_path: Path) -> None:
    config = tiny("lora", min_clients=1, max_steps=3)
    outcome = run_split(config, tmp_path, prepare=dies_before(Kind.SMASHED, 1), dying=frozenset({1}))
    assert_equal_logits(peft_logits(export_to(tmp_path, tmp_path / "out")), own_logits(config, outcome))
    with pytest.raises(ConfigError, match=r"--client 1 left no adapter .* that of client-0"):
        export_to(tmp_path, tmp_path / "again", client=1)
