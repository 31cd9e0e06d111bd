"""A run ends when more than half of the clients see no lower held-out loss; each tells one bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.early_stopping import Patience, majority
from hpc.errors import ConfigError
from hpc.report.events import read_events, role_path
from tests.loopback import run_centralised, run_split


def config(**train: Any) -> Config:
    values: dict[str, Any] = {
        "clients": 3,
        "max_steps": 40,
        "per_client_batch_size": 2,
        "eval_every": 2,
        "early_stopping_patience": 2,
        "learning_rate": 0.3,  # far too high: the held-out loss soon rises
        **train,
    }
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=2),
        data=DataConfig(train_examples=8, val_examples=6),
        train=TrainConfig(**values),
    )


def held_out(path: Path) -> list[float]:
    return [e["loss_sum"] / e["label_tokens"] for e in read_events(path) if e["event"] == "eval"]


def would_have_stopped(losses: list[float], patience: int) -> bool:
    """Written from the definition: the last `patience` are no better than the best before them."""
    return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica"])
def test_the_run_ends_at_the_first_evaluation_with_a_majority(schedule: str, tmp_path: Path) -> None:
    outcome = run_split(config(schedule=schedule), tmp_path)
    (note,) = [e for e in read_events(role_path(tmp_path, "trunk-0")) if e["event"] == "early_stop"]
    assert len(outcome.losses) == note["step"] < 40
    losses = [held_out(role_path(tmp_path, f"client-{k}")) for k in range(3)]
    for evaluations in range(1, len(losses[0]) + 1):
        votes = sum(would_have_stopped(own[:evaluations], 2) for own in losses)
        assert (votes > 1.5) == (evaluations == len(losses[0]))


def test_the_baseline_stops_at_the_same_step(tmp_path: Path) -> None:
    """With one client they are equal to the bit; with more, such a learning rate would blow rounding up."""
    split = run_split(config(schedule="serial", clients=1), tmp_path / "split")
    whole = run_centralised(config(schedule="centralised", clients=1), tmp_path / "whole")
    assert split.losses == whole.losses
    assert len(whole.losses) < 40


def test_patience_counts_evaluations_without_a_lower_loss() -> None:
    patience = Patience(2)
    for loss, exhausted in ((2.0, False), (1.0, False), (1.0, False), (0.9, False), (math.nan, False), (3.0, True)):
        patience.take(loss)
        assert patience.exhausted is exhausted
    again = Patience(2)
    again.load(patience.state())
    assert again.exhausted
    again.take(0.1)
    assert not again.exhausted
    assert not Patience(0).exhausted


@pytest.mark.parametrize(("votes", "voters", "stop"), [(1, 2, False), (2, 3, True), (1, 1, True), (0, 0, False)])
def test_more_than_half(votes: int, voters: int, stop: bool) -> None:
    assert majority(votes, voters) is stop


@pytest.mark.parametrize(
    "train", [{"eval_every": 0}, {"schedule": "replica", "sync_every": 5}, {"schedule": "replica", "sync_every": 3}]
)
def test_it_needs_evaluations_where_parameters_are_averaged(train: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping_patience"):
        config(**train)


def test_it_needs_held_out_examples() -> None:
    with pytest.raises(ConfigError, match="held-out"):
        Config(
            data=DataConfig(val_examples=0),
            train=TrainConfig(eval_every=1, early_stopping_patience=1),
        )
