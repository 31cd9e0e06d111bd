"""Federated schedules written as a notebook would: one PEFT model, and each client's values put into it in turn.

No engine code. Beyond what `tests.plain` takes from the project, it takes which clients make up a round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hpc.config import Config, TrainConfig
from hpc.data.collate import Batch
from hpc.data.dataset import load_client_data
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.schedule import cohort
from tests.plain import by_project_name, labelled, plain_model, plain_run, put_values

Values = dict[str, torch.Tensor]


@dataclass
class Simulated:
    """The loss of each step, and for each client the values of all three parts as it would use them in the end."""

    losses: list[float]
    clients: list[Values]


def simulate(config: Config) -> Simulated:
    """Train by the configuration's schedule (not `serial`), without dropout, secrecy, or lost clients."""
    train = config.train
    assert train.max_steps, "say how many steps"
    if train.schedule == "replica":
        return _everybody_alone(config)
    if train.resolved_aggregation == "gradient":
        cohorts = [cohort(train, step // train.sync_every) for step in range(train.max_steps)]
        losses, values = plain_run(config, cohorts)
        return Simulated(losses, [values] * train.clients)
    return _around_one_trunk(config)


def _around_one_trunk(config: Config) -> Simulated:
    """`fedavg` and `none`: one trunk learns from all of the round's clients, each client has a head and a tail."""
    train, lab = config.train, _Lab(config)
    trunk = _Learner({name: v for name, v in lab.start.items() if lab.part_of(name) == "trunk"}, train)
    ends = {name: v for name, v in lab.start.items() if lab.part_of(name) != "trunk"}
    clients = [_Learner(ends, train) for _ in range(train.clients)]
    losses = []
    for step in range(train.max_steps):
        active = cohort(train, step // train.sync_every)
        batches = {k: lab.next_batch(k) for k in active}
        tokens = sum(batch.label_tokens for batch in batches.values())
        loss_sum = 0.0
        for k, batch in batches.items():
            loss_sum += lab.add_gradients({**trunk.values, **clients[k].values}, batch, tokens)
        learners = [trunk, *(clients[k] for k in active)]
        _clip([p for learner in learners for p in learner.values.values()], train)
        for learner in learners:
            learner.step(_rate(train, step))
        losses.append(loss_sum / tokens)
        if train.resolved_aggregation == "fedavg" and _round_ends(train, step):
            for name in ends:
                _average(name, clients, active, lab.examples)
    return Simulated(losses, [{**trunk.copies(), **client.copies()} for client in clients])


def _everybody_alone(config: Config) -> Simulated:
    """`replica`: each client trains a whole model; the trunks are averaged, and with `fedavg` the rest as well."""
    train, lab = config.train, _Lab(config)
    clients = [_Learner(lab.start, train) for _ in range(train.clients)]
    losses = []
    for step in range(train.max_steps):
        active = cohort(train, step // train.sync_every)
        loss_sum, tokens = 0.0, 0
        for k in active:
            batch = lab.next_batch(k)
            loss_sum += lab.add_gradients(clients[k].values, batch, batch.label_tokens)
            tokens += batch.label_tokens
            _clip(clients[k].values.values(), train)
            clients[k].step(_rate(train, step))
        losses.append(loss_sum / tokens)
        if _round_ends(train, step):
            for name in lab.start:
                if lab.part_of(name) == "trunk" or train.resolved_aggregation == "fedavg":
                    _average(name, clients, active, lab.examples)
    return Simulated(losses, [client.copies() for client in clients])


class _Learner:
    """Values that learn, and their AdamW."""

    def __init__(self, start: Values, train: TrainConfig) -> None:
        self.values = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        betas = (train.adam_beta1, train.adam_beta2)
        rest = {"betas": betas, "eps": train.adam_epsilon, "weight_decay": train.weight_decay}
        # AdamW refuses to have nothing to do, as with a client whose parts are frozen.
        self.optimiser = torch.optim.AdamW(self.values.values(), lr=0.0, **rest) if self.values else None

    def step(self, rate: float) -> None:
        """Once, with the gradients that are there; none are left."""
        if self.optimiser is not None:
            self.optimiser.param_groups[0]["lr"] = rate
            self.optimiser.step()
            self.optimiser.zero_grad()

    def copies(self) -> Values:
        return {name: value.detach().clone() for name, value in self.values.items()}


class _Lab:
    """The one model into which everybody's values are put, and everybody's data."""

    def __init__(self, config: Config) -> None:
        builder = ModelBuilder.of(config)
        tokenizer = load_tokenizer(builder.resolver)
        self._config = config
        self._model = plain_model(config, builder)
        self._blocks = self._model.config.num_hidden_layers
        self._data = [load_client_data(config, k, tokenizer) for k in range(config.train.clients)]
        self._used = [0] * config.train.clients
        self.examples = [len(data.train_rows) for data in self._data]
        self.start = {name: value.clone() for name, value in by_project_name(config, self._model).items()}

    def part_of(self, name: str) -> str:
        """`head`, `trunk` or `tail`: all that learns belongs to a block, or is a part's table of prefixes."""
        if table := re.match(r"prefix\.encoders\.(\w+)\.", name):
            return table[1]
        block = int(re.search(r"\.layers\.(\d+)\.", name)[1])  # type: ignore[index]
        if block < self._config.model.head_blocks:
            return "head"
        return "tail" if block >= self._blocks - self._config.model.tail_blocks else "trunk"

    def next_batch(self, client: int) -> Batch:
        self._used[client] += 1
        return self._data[client].train_batch(self._used[client] - 1)

    def add_gradients(self, values: Values, batch: Batch, tokens: int) -> float:
        """Adds the gradient of the batch's loss sum divided by `tokens`; returns the loss sum."""
        put_values(self._config, self._model, values)
        self._model.zero_grad()
        loss_sum = self._model(**labelled(batch)).loss * batch.label_tokens
        (loss_sum / tokens).backward()
        for name, gradient in by_project_name(self._config, self._model, lambda parameter: parameter.grad).items():
            before = values[name].grad
            values[name].grad = gradient.clone() if before is None else before + gradient
        return float(loss_sum.detach())


def _rate(train: TrainConfig, step: int) -> float:
    assert train.warmup_steps == 0
    left = (train.max_steps - step) / train.max_steps if train.lr_scheduler == "linear" else 1.0
    return train.learning_rate * left


def _clip(parameters: Iterable[torch.Tensor], train: TrainConfig) -> None:
    if train.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(list(parameters), train.max_grad_norm)


def _round_ends(train: TrainConfig, step: int) -> bool:
    return (step + 1) % train.sync_every == 0 or step + 1 == train.max_steps


def _average(name: str, clients: list[_Learner], active: tuple[int, ...], examples: list[int]) -> None:
    """Everybody takes up the mean of the round's clients, weighted by their training examples. Moments stay."""
    total = sum(examples[k] for k in active)
    mean = sum(clients[k].values[name].detach().double() * (examples[k] / total) for k in active)
    with torch.no_grad():
        for client in clients:
            client.values[name].copy_(mean)
