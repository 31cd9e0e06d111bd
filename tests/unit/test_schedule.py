"""The order of work: whose batch when, who holds the newest parts, and that steps add up."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import TrainConfig
from hpc.schedule import Evaluate, HandOver, TrainStep, clients_of_step, instructions, total_steps

trains = st.builds(
    TrainConfig,
    schedule=st.sampled_from(["serial", "client_batch", "centralised", "pipelined", "replica"]),
    clients=st.integers(1, 64),
    max_steps=st.integers(1, 60),
    sync_every=st.integers(1, 5),
    eval_every=st.integers(0, 7),
    eval_before=st.booleans(),
    order=st.sampled_from(["union", "sequential"]),
)


@given(trains, st.booleans())
def test_every_step_comes_once_and_in_order(train: TrainConfig, evaluate: bool) -> None:
    stream = list(instructions(train, evaluate=evaluate))
    assert [i.step for i in stream if isinstance(i, TrainStep)] == list(range(train.max_steps))
    evaluations = [i.step for i in stream if isinstance(i, Evaluate)]
    assert evaluations == sorted(set(evaluations))
    assert evaluations[-1:] == ([train.max_steps] if evaluate else [])
    assert (0 in evaluations) == (evaluate and train.eval_before)
    on_the_way = [step for step in range(1, train.max_steps) if train.eval_every and step % train.eval_every == 0]
    assert [step for step in evaluations if 0 < step < train.max_steps] == (on_the_way if evaluate else [])


@given(trains)
def test_a_client_uses_its_batches_one_after_another(train: TrainConfig) -> None:
    used: dict[int, list[int]] = {}
    for order in instructions(train, evaluate=False):
        if isinstance(order, TrainStep):
            assert order.clients == clients_of_step(train, order.step)
            for client in order.clients:
                used.setdefault(client, []).append(order.batch_of(client))
    for batches in used.values():
        assert batches == list(range(len(batches)))


@given(trains, st.booleans())
def test_whoever_works_evaluates_or_ends_has_the_newest_parts(train: TrainConfig, evaluate: bool) -> None:
    """Follow the parts by version number, as a client without the newest one would train something else."""
    version = dict.fromkeys(range(train.clients), 0)
    newest = 0
    for instruction in instructions(train, evaluate=evaluate):
        match instruction:
            case HandOver():
                assert version[instruction.sender] == newest
                assert instruction.sender not in instruction.receivers
                version |= dict.fromkeys(instruction.receivers, newest)
            case TrainStep() if train.schedule == "serial":
                (client,) = instruction.clients
                assert version[client] == newest
                newest += 1
                version[client] = newest
            case Evaluate():
                assert set(version.values()) == {newest}
    if train.hands_over:  # else each keeps its own, or all are averaged
        assert set(version.values()) == {newest}


def test_serial_by_hand() -> None:
    train = TrainConfig(schedule="serial", clients=2, max_steps=4, sync_every=2)
    kinds: list[Any] = [
        (type(i).__name__, getattr(i, "clients", getattr(i, "receivers", None)))
        for i in instructions(train, evaluate=False)
    ]
    assert kinds == [
        ("TrainStep", (0,)),
        ("TrainStep", (0,)),
        ("HandOver", (1,)),
        ("TrainStep", (1,)),
        ("TrainStep", (1,)),
        ("HandOver", (0,)),
    ]


def test_parts_that_stay_are_never_handed_over() -> None:
    train = TrainConfig(schedule="serial", aggregation="none", clients=3, max_steps=9)
    assert not [i for i in instructions(train, evaluate=True) if isinstance(i, HandOver)]


@pytest.mark.parametrize(
    ("schedule", "order", "steps"),
    [("serial", "union", 24), ("client_batch", "union", 8), ("centralised", "sequential", 24)],
)
def test_rounds_become_steps(schedule: Any, order: Any, steps: int) -> None:
    train = TrainConfig(schedule=schedule, order=order, clients=3, max_steps=0, rounds=4, sync_every=2)
    assert total_steps(train) == steps
