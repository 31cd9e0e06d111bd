"""Resumed equals uninterrupted, to the bit; a checkpoint exists when every role's part of it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.checkpoint import checkpoint_folder, read_role, write_role
from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig, TrunkConfig
from hpc.resume import committed_steps
from hpc.schedule import Save, instructions
from tests.loopback import run_centralised, run_split

ROOT = Path(__file__).resolve().parents[2]


def tiny(method: Any = "lora", stage: int = 0, **train: Any) -> Config:
    json_file = str(ROOT / "slurm" / "deepspeed" / f"zero{stage}.json") if stage else None
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(method=method, lora_r=4, num_virtual_tokens=5),
        data=DataConfig(train_examples=10, val_examples=4),
        train=TrainConfig(
            **{"max_steps": 8, "save_every": 3, "per_client_batch_size": 3, "weight_decay": 0.1, **train}
        ),
        trunk=TrunkConfig(deepspeed=json_file),
    )


@pytest.mark.parametrize(
    ("method", "stage"), [("lora", 0), ("p_tuning_v2", 0), ("full", 0), ("lora", 1), ("lora", 2), ("lora", 3)]
)
def test_resumed_equals_uninterrupted(method: str, stage: int, tmp_path: Path) -> None:
    config = tiny(method, stage)
    whole = run_split(config, tmp_path)
    assert committed_steps(tmp_path) == [3, 6]
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    resumed = run_split(config, tmp_path, start=3)
    assert resumed.losses == whole.losses[3:]
    for name, tensor in whole.trained.items():
        assert torch.equal(tensor, resumed.trained[name]), name


@pytest.mark.parametrize(("before", "after"), [(0, 2), (3, 0), (2, 3)])
def test_a_checkpoint_goes_on_with_another_zero_stage(before: int, after: int, tmp_path: Path) -> None:
    """The file holds whole tensors in float32, whichever way they were partitioned."""
    whole = run_split(tiny(stage=before), tmp_path)
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    resumed = run_split(tiny(stage=after), tmp_path, start=3)
    assert resumed.losses == pytest.approx(whole.losses[3:], rel=1e-6)


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "pipelined", "micro_batches": 2},
        {"schedule": "client_batch", "aggregation": "fedavg", "sync_every": 2},
        {"schedule": "replica", "sync_every": 2, "clients": 3, "clients_per_round": 2},
        {"schedule": "replica", "aggregation": "none", "sync_every": 5},
        {"schedule": "serial", "sync_every": 2, "eval_every": 2},
    ],
)
def test_every_schedule_resumes_in_the_middle_of_a_round(train: dict[str, Any], tmp_path: Path) -> None:
    """Clients outside the round's cohort keep their moments, averages fall where they would have."""
    config = tiny(**train)
    peers = None
    if config.train.hands_over:
        from hpc.link.identity import ensure_local
        from tests.unit.test_lost_clients import peers_in

        ensure_local(tmp_path / "keys", 3)
        peers = [peers_in(tmp_path / "keys"), peers_in(tmp_path / "keys")]
    whole = run_split(config, tmp_path, peers=peers and peers[0])
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    resumed = run_split(config, tmp_path, start=3, peers=peers and peers[1])
    assert resumed.losses == whole.losses[3:]
    assert resumed.correct[8] == whole.correct[8]
    for name, tensor in whole.trained.items():
        assert torch.equal(tensor, resumed.trained[name]), name
    for one, other in zip(whole.clients, resumed.clients, strict=True):
        for name, tensor in one.learner.parameters.items():
            assert torch.equal(tensor, other.learner.parameters[name]), name


def test_the_baseline_resumes_too(tmp_path: Path) -> None:
    config = tiny(schedule="centralised")
    whole = run_centralised(config, tmp_path)
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    assert run_centralised(config, tmp_path, start=6).losses == whole.losses[6:]


@pytest.mark.parametrize("schedule", ["serial", "client_batch", "replica"])
@pytest.mark.parametrize("start", [2, 4, 6])
def test_the_rest_of_the_schedule_is_the_same(schedule: Any, start: int) -> None:
    train = TrainConfig(schedule=schedule, clients=3, clients_per_round=2, max_steps=9, save_every=2, eval_every=3)
    stream = list(instructions(train, evaluate=True))
    assert list(instructions(train, evaluate=True, start=start)) == stream[stream.index(Save(step=start)) + 1 :]


def test_state_survives_to_the_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.randn(6, 2).T}
    facts = {"loss_scale": 0.1 + 0.2, "good_steps": 3.0}
    write_role(tmp_path, 1, "trunk", tensors, facts)
    read, numbers = read_role(checkpoint_folder(tmp_path, 1), "trunk")
    assert all(torch.equal(tensors[name], read[name]) for name in tensors)
    assert numbers == facts
