"""Schedules: the order of work in a run, as a stream of instructions that every role reads alike. Pure.

No role sends or receives anything that an instruction here does not imply, so the order of messages is the schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpc.config import TrainConfig


@dataclass(kw_only=True, frozen=True)
class TrainStep:
    """One optimiser step of the trunk on one batch of each of `clients`. Steps count from 0."""

    step: int
    clients: tuple[int, ...]


@dataclass(kw_only=True, frozen=True)
class HandOver:
    """`sender` gives its parts and optimiser state to `receivers`, sealed end to end; the trunk only relays."""

    step: int
    sender: int
    receivers: tuple[int, ...]


@dataclass(kw_only=True, frozen=True)
class Evaluate:
    """Every client scores its held-out examples; `step` optimiser steps have been taken."""

    step: int


@dataclass(kw_only=True, frozen=True)
class Save:
    """Every role writes its state after `step` optimiser steps; then the checkpoint is committed."""

    step: int


DEFAULT_STEPS = 100
Instruction = TrainStep | HandOver | Evaluate | Save


def total_steps(train: TrainConfig) -> int:
    """Optimiser steps of the trunk in the whole run."""
    if train.rounds == 0:
        return train.max_steps or DEFAULT_STEPS
    return train.rounds * train.sync_every * (train.clients if _one_by_one(train) else 1)


def batch_index(train: TrainConfig, step: int) -> int:
    """Which batch of its own data a client uses at `step`: the number of steps that it took part in before."""
    if not _one_by_one(train):
        return step
    turn, inside = divmod(step, train.sync_every)
    return (turn // train.clients) * train.sync_every + inside


def clients_of_step(train: TrainConfig, step: int) -> tuple[int, ...]:
    """The clients whose batches make up `step`: all, or (client by client) the one whose turn it is."""
    if _one_by_one(train):
        return (step // train.sync_every % train.clients,)
    return tuple(range(train.clients))


def instructions(train: TrainConfig, *, evaluate: bool, start: int = 0) -> Iterator[Instruction]:
    """The run from the checkpoint at `start` (0: from the beginning).

    With `evaluate`, before the first step, every `eval_every` steps, and after the last.
    """
    if start == 0:
        yield from _whole(train, evaluate)
        return
    # Who holds the newest parts follows from what was skipped, so the stream is the same with its beginning cut off.
    yield from (i for i in _whole(train, evaluate) if i.step >= start and i != Save(step=start))


def _whole(train: TrainConfig, evaluate: bool) -> Iterator[Instruction]:
    everyone = tuple(range(train.clients))
    current, holder = set(everyone), 0  # clients whose parts are the newest, and one of them
    steps = total_steps(train)
    for step in range(steps + 1):
        if step and train.save_every and step % train.save_every == 0:
            yield Save(step=step)
        if evaluate and (step in (0, steps) or (train.eval_every and step % train.eval_every == 0)):
            if train.hands_over and (stale := tuple(c for c in everyone if c not in current)):
                yield HandOver(step=step, sender=holder, receivers=stale)
                current = set(everyone)
            yield Evaluate(step=step)
        if step == steps:
            return
        active = clients_of_step(train, step)
        if train.hands_over:
            if active[0] not in current:
                yield HandOver(step=step, sender=holder, receivers=active)
            current, holder = set(active), active[0]
        yield TrainStep(step=step, clients=active)


def _one_by_one(train: TrainConfig) -> bool:
    return train.schedule == "serial" or (train.schedule == "centralised" and train.order == "sequential")
