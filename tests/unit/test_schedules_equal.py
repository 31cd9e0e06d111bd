"""Federated schedules compute what plain PyTorch computes (tests/plain_federated.py), and not what chance decides.

Clients have files of different sizes and rows of different lengths, so weights and padding matter.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import AdapterConfig, Config, DataConfig, TrunkConfig
from hpc.link.identity import Authorised, client_name, load_private
from hpc.link.peers import PeerKeys
from hpc.report.events import read_events, role_path
from hpc.schedule import cohort
from tests.loopback import Outcome, run_split
from tests.plain import plain_run
from tests.plain_federated import Simulated, simulate
from tests.unit.test_equalities import ADAPTERS, assert_close, tiny

SIZES = (5, 11, 3, 8, 6)  # training examples of each client; batches have three
WORDS = ["fever", "cough", "asthma", "stable", "pain", "left", "right", "ward", "night", "better", "worse", "calm"]
# With its usual epsilon Adam divides noise by noise where a gradient is nearly zero. With this one nothing amplifies
# rounding, so that losses and final values can be compared a hundred times more closely.
STEADY = 1e-3


def files(folder: Path, sizes: tuple[int, ...] = SIZES) -> DataConfig:
    """A file of its own for each client: the higher its number, the longer its passages may be."""
    folder.mkdir(parents=True, exist_ok=True)
    for client, size in enumerate(sizes):
        draw = random.Random(client)
        records = [
            {
                "passage": " ".join(draw.choices(WORDS, k=draw.randint(1, 3 + 2 * client))),
                "question": f"is it {draw.choice(WORDS)}",
                "label": draw.random() < 0.5,
            }
            for _ in range(size)
        ]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return DataConfig(task="jsonl", train_file=str(folder / "{client_id}.jsonl"), partition="files", val_examples=0)


def federated(folder: Path, adapter: str = "lora", *, sizes: tuple[int, ...] = SIZES, **train: Any) -> Config:
    clipped = {"lora": 0.5, "p_tuning_v2": 0.1}[adapter]  # below the norm of most steps
    values: dict[str, Any] = {"max_steps": 7, "adam_epsilon": STEADY, "max_grad_norm": clipped, **train}
    return replace(tiny(adapter, **values), data=files(folder / "data", sizes))


def of_client(outcome: Outcome, client: int) -> dict[str, torch.Tensor]:
    """The client's head and tail, and the trunk's values beside them: with replicas, those of this client."""
    mine = f"replica-{client}/"
    own = {name: parameter.detach() for name, parameter in outcome.clients[client].learner.parameters.items()}
    shared = {name.removeprefix(mine): value for name, value in outcome.trained.items()}
    return {**{name: value for name, value in shared.items() if not name.startswith("replica-")}, **own}


def assert_as_simulated(
    outcome: Outcome, expected: Simulated, *, later: float = 1e-5, rtol: float = 0, atol: float = 5e-6
) -> None:
    """Losses step by step, and every client's final values."""
    assert_close(outcome.losses, expected.losses, later=later)
    assert len(outcome.clients) == len(expected.clients)
    for client, values in enumerate(expected.clients):
        found = of_client(outcome, client)
        assert found.keys() == values.keys()
        for name, value in values.items():
            torch.testing.assert_close(
                found[name],
                value,
                rtol=rtol,
                atol=atol,
                msg=lambda text, client=client, name=name: f"client {client}, {name}: {text}",
            )


def assert_same_bits_everywhere(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses
    assert len(one.clients) == len(other.clients)
    for client in range(len(one.clients)):
        first, second = of_client(one, client), of_client(other, client)
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"client {client}, {name}"


# The reference itself, without the engine.


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("schedule", "aggregation"), [("client_batch", "fedavg"), ("pipelined", "none"), ("replica", "fedavg")]
)
def test_reference_with_one_client_is_plain_training(
    adapter: str, schedule: str, aggregation: str, tmp_path: Path
) -> None:
    train = {"schedule": schedule, "aggregation": aggregation, "sync_every": 3}
    config = federated(tmp_path, adapter, clients=1, **train)
    losses, values = plain_run(config, [[0]] * 7)
    found = simulate(config)
    assert_close(found.losses, losses)
    for name, value in values.items():
        torch.testing.assert_close(found.clients[0][name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", ["client_batch", "replica"])
def test_reference_with_like_clients_is_plain_training_of_one(schedule: str, tmp_path: Path) -> None:
    """Whose batches are the same three rows, in whatever order: averaging likes changes nothing.

    Around one trunk a client's gradient is a third of the whole, which Adam does not notice without epsilon.
    """
    train = {"clients": 3, "aggregation": "fedavg", "sync_every": 2, "max_grad_norm": 0.0, "adam_epsilon": 1e-12}
    config = federated(tmp_path, "p_tuning_v2", schedule=schedule, **train)
    folder = tmp_path / "data"
    rows = (folder / "2.jsonl").read_text()
    for client in range(3):
        (folder / f"{client}.jsonl").write_text(rows)
    losses, values = plain_run(config, [[2]] * 7)
    found = simulate(config)
    assert_close(found.losses, losses)
    for client in found.clients:
        for name, value in values.items():
            torch.testing.assert_close(client[name], value, rtol=0, atol=1e-4)


# The engine against the reference.


@pytest.mark.parametrize(
    ("adapter", "clients", "micro_batches"),
    [
        ("lora", 1, 2),
        ("p_tuning_v2", 1, 2),
        ("p_tuning_v2", 2, 1),
        ("lora", 3, 3),
        ("p_tuning_v2", 3, 3),
        ("lora", 5, 2),
    ],
)
def test_pipelined_equals_one_model(adapter: str, clients: int, micro_batches: int, tmp_path: Path) -> None:
    config = federated(tmp_path, adapter, schedule="pipelined", clients=clients, micro_batches=micro_batches)
    outcome = run_split(config, tmp_path / "run")
    assert_as_simulated(outcome, simulate(config))
    assert outcome.losses[0] != outcome.losses[-1]


@pytest.mark.parametrize(
    ("schedule", "adapter", "train"),
    [
        ("pipelined", "lora", {"micro_batches": 2}),
        ("pipelined", "p_tuning_v2", {"aggregation": "fedavg", "sync_every": 3}),
        ("replica", "lora", {"sync_every": 4}),
    ],
)
def test_fifty_steps_with_the_usual_epsilon(schedule: str, adapter: str, train: dict[str, Any], tmp_path: Path) -> None:
    settings = {"clients": 2, "max_steps": 50, "adam_epsilon": 1e-8, "learning_rate": 3e-3, **train}
    config = federated(tmp_path, adapter, schedule=schedule, **settings)
    outcome = run_split(config, tmp_path / "run")
    assert_as_simulated(outcome, simulate(config), later=1e-4, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_pipelined_on_ward_notes(micro_batches: int, tmp_path: Path) -> None:
    config = tiny(schedule="pipelined", clients=3, max_steps=5, micro_batches=micro_batches, adam_epsilon=STEADY)
    config = replace(config, data=DataConfig(train_examples=7, val_examples=0))
    assert_as_simulated(run_split(config, tmp_path), simulate(config))


@pytest.mark.parametrize(
    ("schedule", "adapter", "clients", "sync_every"),
    [
        ("client_batch", "lora", 2, 1),
        ("client_batch", "lora", 3, 3),
        ("client_batch", "p_tuning_v2", 3, 3),
        ("pipelined", "lora", 2, 3),
        ("pipelined", "p_tuning_v2", 3, 1),
        ("pipelined", "lora", 1, 3),
    ],
)
def test_fedavg_around_one_trunk(schedule: str, adapter: str, clients: int, sync_every: int, tmp_path: Path) -> None:
    train = {"schedule": schedule, "clients": clients, "sync_every": sync_every}
    config = federated(tmp_path, adapter, aggregation="fedavg", **train)
    assert_as_simulated(run_split(config, tmp_path / "run"), simulate(config))


@pytest.mark.parametrize(("schedule", "adapter"), [("client_batch", "p_tuning_v2"), ("pipelined", "lora")])
def test_clients_with_parts_of_their_own_around_one_trunk(schedule: str, adapter: str, tmp_path: Path) -> None:
    config = federated(tmp_path, adapter, schedule=schedule, clients=3, aggregation="none", sync_every=2)
    assert_as_simulated(run_split(config, tmp_path / "run"), simulate(config))


@pytest.mark.parametrize(
    ("aggregation", "adapter", "clients", "sync_every"),
    [
        ("fedavg", "lora", 3, 1),
        ("fedavg", "p_tuning_v2", 3, 1),
        ("fedavg", "lora", 2, 4),
        ("fedavg", "p_tuning_v2", 1, 4),
        ("fedavg", "p_tuning_v2", 5, 4),
        ("none", "p_tuning_v2", 2, 1),
        ("none", "lora", 3, 4),
    ],
)
def test_replica(aggregation: str, adapter: str, clients: int, sync_every: int, tmp_path: Path) -> None:
    train = {"clients": clients, "aggregation": aggregation, "sync_every": sync_every}
    config = federated(tmp_path, adapter, schedule="replica", **train)
    assert_as_simulated(run_split(config, tmp_path / "run"), simulate(config))


@pytest.mark.parametrize(
    ("schedule", "aggregation", "adapter"),
    [
        ("client_batch", "gradient", "lora"),
        ("client_batch", "fedavg", "p_tuning_v2"),
        ("client_batch", "none", "lora"),
        ("pipelined", "gradient", "p_tuning_v2"),
        ("pipelined", "fedavg", "lora"),
        ("pipelined", "none", "p_tuning_v2"),
        ("replica", "fedavg", "lora"),
        ("replica", "none", "p_tuning_v2"),
        ("replica", "none", "lora"),
    ],
)
def test_cohorts(schedule: str, aggregation: str, adapter: str, tmp_path: Path) -> None:
    """Two of five clients in each round of two steps; the last round is cut short."""
    train = {"schedule": schedule, "aggregation": aggregation, "clients_per_round": 2, "sync_every": 2}
    config = federated(tmp_path, adapter, clients=5, **train)
    cohorts = [cohort(config.train, round_) for round_ in range(4)]
    assert len(set(cohorts)) > 2
    assert any(set(first) & set(later) and first != later for first, later in itertools.pairwise(cohorts))
    assert_as_simulated(run_split(config, tmp_path / "run"), simulate(config))


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica"])
def test_without_clipping_and_with_other_betas(schedule: str, tmp_path: Path) -> None:
    train = {"schedule": schedule, "aggregation": "fedavg", "sync_every": 2, "lr_scheduler": "constant"}
    settings = {"max_grad_norm": 0.0, "adam_beta1": 0.7, "adam_beta2": 0.9, "max_steps": 5}
    config = federated(tmp_path, clients=2, **train, **settings)
    assert_as_simulated(run_split(config, tmp_path / "run"), simulate(config))


# Secrecy costs no accuracy.


def peer_keys(folder: Path, clients: int) -> dict[int, PeerKeys]:
    """Fresh, and not yet exchanged: that is the federation's own task."""
    pinned = Authorised.load(folder).by_client_id()
    return {k: PeerKeys(k, load_private(folder, client_name(k)), pinned, "run") for k in range(clients)}


@pytest.mark.parametrize(
    ("schedule", "aggregation", "adapter", "cohort_size"),
    [
        ("client_batch", "gradient", "lora", 0),
        ("client_batch", "fedavg", "p_tuning_v2", 2),
        ("pipelined", "gradient", "p_tuning_v2", 2),
        ("pipelined", "fedavg", "lora", 0),
        ("replica", "fedavg", "lora", 0),
        ("replica", "fedavg", "p_tuning_v2", 2),
    ],
)
def test_secure_aggregation_changes_next_to_nothing(
    schedule: str, aggregation: str, adapter: str, cohort_size: int, pristine_keys: Path, tmp_path: Path
) -> None:
    train = {"schedule": schedule, "aggregation": aggregation, "clients": 3, "clients_per_round": cohort_size}
    config = federated(tmp_path, adapter, max_steps=5, sync_every=2, **train)
    secure = replace(config, train=replace(config.train, secure_aggregation=True))
    plain = run_split(config, tmp_path / "plain")
    masked = run_split(secure, tmp_path / "masked", peers=peer_keys(pristine_keys, 3))
    assert masked.losses == pytest.approx(plain.losses, rel=1e-6)
    for client in range(3):
        expected, found = of_client(plain, client), of_client(masked, client)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6)


# Chance decides nothing.


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "pipelined", "micro_batches": 3},
        {"schedule": "pipelined", "micro_batches": 2, "aggregation": "fedavg", "sync_every": 2, "clients_per_round": 2},
        {"schedule": "replica", "sync_every": 2},
    ],
    ids=["pipelined", "pipelined-fedavg-cohorts", "replica"],
)
def test_two_runs_with_one_seed_give_the_same_bits(train: dict[str, Any], tmp_path: Path) -> None:
    config = federated(tmp_path, clients=3, max_steps=5, adam_epsilon=1e-8, **train)
    assert_same_bits_everywhere(run_split(config, tmp_path / "a"), run_split(config, tmp_path / "b"))


class HeldBack:
    """A transport whose messages leave some time after they were given to it."""

    def __init__(self, transport: Any, seconds: Callable[[], float], sent: Callable[[], None]) -> None:
        self._transport, self._seconds, self._sent = transport, seconds, sent

    def send(self, buffer: torch.Tensor) -> Any:
        time.sleep(self._seconds())
        self._sent()
        return self._transport.send(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def run_held_back(config: Config, folder: Path, seconds: Callable[[int], float]) -> tuple[Outcome, list[int]]:
    """A run in which client k's messages wait `seconds(k)`; and who sent when."""
    ends, order = itertools.count(), []  # run_split makes each client's end of a link, then the server's

    def wrap(transport: Any) -> Any:
        client, servers_end = divmod(next(ends), 2)
        if servers_end:
            return transport
        return HeldBack(transport, lambda: seconds(client), lambda: order.append(client))

    outcome = run_split(config, folder, wrap=wrap)
    assert next(ends) == 2 * config.train.clients
    return outcome, order


def mean_place(order: list[int], client: int) -> float:
    return statistics.mean(place for place, sender in enumerate(order) if sender == client)


@pytest.mark.parametrize(("aggregation", "adapter"), [("gradient", "p_tuning_v2"), ("fedavg", "lora")])
def test_order_of_arrival_changes_no_bit(aggregation: str, adapter: str, tmp_path: Path) -> None:
    train = {"schedule": "pipelined", "micro_batches": 2, "aggregation": aggregation}
    config = federated(tmp_path, adapter, clients=3, max_steps=4, adam_epsilon=1e-8, **train)
    luck = random.Random(0)
    delays: list[Callable[[int], float]] = [
        lambda client: 0.02 if client == 0 else 0.0,
        lambda client: 0.02 if client == 2 else 0.0,
        lambda client: luck.uniform(0, 0.02),
    ]
    runs = [run_held_back(config, tmp_path / str(index), delay) for index, delay in enumerate(delays)]
    (first, first_order), (second, second_order), (third, _) = runs
    assert mean_place(first_order, 0) > mean_place(first_order, 2), "client 0's messages come later"
    assert mean_place(second_order, 0) < mean_place(second_order, 2), "client 2's messages come later"
    assert_same_bits_everywhere(first, second)
    assert_same_bits_everywhere(first, third)


# Frozen heads: what was sent once need not be sent again.


def payload_bytes(folder: Path) -> list[int]:
    """Tensor bytes on the links in each step, both directions."""
    return [e["bytes"]["payload"] for e in read_events(role_path(folder, "trunk-0")) if e["event"] == "step"]


def cached(tmp_path: Path, adapter: str, **train: Any) -> tuple[Config, dict[float, Outcome]]:
    """The same run with no cache, with room for all rows, and with room for a few."""
    method = AdapterConfig(**{**vars(ADAPTERS[adapter]), "parts": ["trunk", "tail"]})
    config = replace(federated(tmp_path, clients=2, max_steps=8, **train), adapter=method)
    outcomes = {}
    for mib in (0.0, 8.0, 0.03):
        own = replace(config, trunk=TrunkConfig(smashed_cache_mib=mib))
        outcomes[mib] = run_split(own, tmp_path / str(mib))
    assert sum(payload_bytes(tmp_path / "8.0")) < sum(payload_bytes(tmp_path / "0.0"))
    return config, outcomes


@pytest.mark.parametrize(
    ("schedule", "adapter", "train"),
    [
        ("client_batch", "lora", {"sizes": (3, 4), "per_client_batch_size": 1}),
        ("pipelined", "p_tuning_v2", {"sizes": (6, 9), "micro_batches": 3, "aggregation": "fedavg"}),
        ("replica", "lora", {"sizes": (3, 4), "per_client_batch_size": 1}),
    ],
)
def test_cache_changes_no_bit_where_rows_go_through_the_head_one_by_one(
    schedule: str, adapter: str, train: dict[str, Any], tmp_path: Path
) -> None:
    _, outcomes = cached(tmp_path, adapter, schedule=schedule, adam_epsilon=1e-8, **train)
    assert_same_bits_everywhere(outcomes[0.0], outcomes[8.0])
    assert_same_bits_everywhere(outcomes[0.0], outcomes[0.03])


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica"])
def test_cache_changes_next_to_nothing_where_rows_have_neighbours(schedule: str, tmp_path: Path) -> None:
    """In every epoch a row has other neighbours and padding, with which the head's kernels round it otherwise."""
    config, outcomes = cached(tmp_path, "lora", schedule=schedule, sizes=(6, 9))
    expected = simulate(config)
    for outcome in outcomes.values():
        assert_as_simulated(outcome, expected, later=1e-6, atol=1e-6)
