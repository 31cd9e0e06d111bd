"""Schedules: the order of work in a run, as a stream of instructions that every role reads alike. Pure.

What is sent and received within one instruction is in `hpc.programs`. No role sends anything that these two do not
imply, so the order of messages is the schedule.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from hpc.config import TrainConfig


@dataclass(kw_only=True, frozen=True)
class TrainStep:
    """One optimiser step of the trunk on one batch of each of `clients`. Steps count from 0."""

    step: int
    clients: tuple[int, ...]
    batches: tuple[int, ...]
    """Which batch of its own data each of `clients` uses: the number of steps that it took part in before."""

    def batch_of(self, client: int) -> int:
        return self.batches[self.clients.index(client)]


@dataclass(kw_only=True, frozen=True)
class Sync:
    """After `step` steps, `clients` (the round's) give parameters to be averaged; every client takes up the average."""

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
Instruction = TrainStep | Sync | HandOver | Evaluate | Save


def total_steps(train: TrainConfig) -> int:
    """Optimiser steps of the trunk in the whole run."""
    return train.rounds * _steps_of_round(train) if train.rounds else train.max_steps or DEFAULT_STEPS


def cohort(train: TrainConfig, round_: int) -> tuple[int, ...]:
    """The clients of a round, in order: all, or `clients_per_round` drawn from the seed and the round's number."""
    return _draw(train.seed, train.clients, train.cohort_size, round_)


@lru_cache(maxsize=64)
def _draw(seed: int, clients: int, size: int, round_: int) -> tuple[int, ...]:
    if size == clients:
        return tuple(range(clients))
    lots = {k: hashlib.sha256(f"{seed}:cohort:{round_}:{k}".encode()).digest() for k in range(clients)}
    return tuple(sorted(sorted(lots, key=lots.__getitem__)[:size]))


def clients_of_step(train: TrainConfig, step: int) -> tuple[int, ...]:
    """The clients whose batches make up `step`: the round's, or (client by client) the one whose turn it is."""
    round_, inside = divmod(step, _steps_of_round(train))
    drawn = cohort(train, round_)
    return (drawn[inside // train.sync_every],) if _one_by_one(train) else drawn


def instructions(train: TrainConfig, *, evaluate: bool, start: int = 0) -> Iterator[Instruction]:
    """The run from the checkpoint at `start` (0: from the beginning).

    With `evaluate`, before the first step (`eval_before`), every `eval_every` steps, and after the last.
    """
    if start == 0:
        yield from _whole(train, evaluate)
        return
    # Who holds the newest parts, and which batches were used, follows from what was skipped, so the stream is the same
    # with its beginning cut off. The checkpoint was written after the average at its step.
    for instruction in _whole(train, evaluate):
        done = instruction.step == start and isinstance(instruction, (Sync, Save))
        if instruction.step >= start and not done:
            yield instruction


def _whole(train: TrainConfig, evaluate: bool) -> Iterator[Instruction]:
    everyone = tuple(range(train.clients))
    current, holder = set(everyone), 0  # clients whose parts are the newest, and one of them
    used: Counter[int] = Counter()
    steps = total_steps(train)
    for step in range(steps + 1):
        if step and train.averages and (step % train.sync_every == 0 or step == steps):
            yield Sync(step=step, clients=clients_of_step(train, step - 1))
        if step and train.save_every and step % train.save_every == 0:
            yield Save(step=step)
        evaluates = evaluate and _evaluates_at(train, step, steps)
        stale = tuple(c for c in everyone if c not in current)
        if train.hands_over and stale and (evaluates or step == steps):  # all of them end with what the run learned
            yield HandOver(step=step, sender=holder, receivers=stale)
            current = set(everyone)
        if evaluates:
            yield Evaluate(step=step)
        if step == steps:
            return
        active = clients_of_step(train, step)
        if train.hands_over:
            if active[0] not in current:
                yield HandOver(step=step, sender=holder, receivers=active)
            current, holder = set(active), active[0]
        yield TrainStep(step=step, clients=active, batches=tuple(used[client] for client in active))
        used.update(active)


def _evaluates_at(train: TrainConfig, step: int, steps: int) -> bool:
    if step == 0:
        return train.eval_before
    return step == steps or bool(train.eval_every and step % train.eval_every == 0)


def _steps_of_round(train: TrainConfig) -> int:
    return train.sync_every * (train.cohort_size if _one_by_one(train) else 1)


def _one_by_one(train: TrainConfig) -> bool:
    return train.schedule == "serial" or (train.schedule == "centralised" and train.order == "sequential")
