"""What a run of a table will take: time, memory of its roles, bytes over the links. Pure: numbers in, numbers out.

Every row counts as long as it may become (`data.max_source_length` + `data.max_target_length`), so real runs take less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpc.config import Config
from hpc.data.wording import task_of
from hpc.reproduce.assumptions import Assumptions
from hpc.schedule import total_steps

FORWARD, FROZEN_STEP, FULL_STEP = 2, 4, 6
"""Operations for each parameter and token: multiply and add, forward; the gradient of activations takes as many again,
that of weights, too. Attention itself is left out, as is usual for rows shorter than the hidden size is wide."""
PARAMETER_BYTES = 4
"""What learns is float32, wherever it goes."""
STATE = 3
"""What a hand-over has of each value that learns: itself and AdamW's two moments."""
NOTES = """\
time: 2 operations for each parameter of the blocks and each token forward, 2 more backward (4 with adapter.method
full), at the speed above, and the start. Every row is at its longest; decoding counts each token once, but is slower.
links: payload over all links in both directions. A step has hidden states there and back, twice, and gradients to be
summed; a run has evaluations, hand-overs and averages, too.
The cut model is taken to be as fast as the uncut one, where the paper's took 1.97 times as long on one machine.
zero_shot has no run of its own: the first seed's centralised run with lora is scored before its first step."""


@dataclass(kw_only=True, frozen=True)
class ModelSize:
    """A model at a cut, with an adapter."""

    hidden_size: int
    value_bytes: int
    """Of a hidden state's value: what `model.dtype` takes."""
    block_values: int
    """Parameters of all blocks."""
    client_learning: int
    """Values that learn in a client's parts."""


def row_tokens(config: Config) -> int:
    """Tokens of one row in a training batch."""
    return config.data.longest_row


def step_rows(config: Config) -> int:
    """Rows of one optimiser step."""
    train = config.train
    one_by_one = train.schedule == "serial" or (train.schedule == "centralised" and train.order == "sequential")
    return train.per_client_batch_size * (1 if one_by_one else train.cohort_size)


def run_flops(config: Config, size: ModelSize, assumed: Assumptions) -> float:
    """Of training and all evaluations."""
    per_value = FULL_STEP if config.adapter.method == "full" else FROZEN_STEP
    training = float(total_steps(config.train)) * step_rows(config) * row_tokens(config) * per_value
    scoring = evaluations(config) * evaluated_tokens(config, assumed) * FORWARD
    return (training + scoring) * size.block_values


def run_seconds(config: Config, size: ModelSize, assumed: Assumptions) -> float:
    return assumed.start_s + run_flops(config, size, assumed) / (assumed.tflops * 1e12)


def evaluations(config: Config) -> int:
    """How often the held-out examples are scored."""
    train = config.train
    if not config.data.evaluates:
        return 0
    between = (total_steps(train) - 1) // train.eval_every if train.eval_every else 0
    return 1 + between + train.eval_before


def evaluated_tokens(config: Config, assumed: Assumptions) -> int:
    """Tokens of all clients' held-out rows, once; those that are decoded pass a second time."""
    data = config.data
    examples = config.train.clients * data.val_examples
    examples = min(examples, assumed.held_out.get(data.task, examples))
    rows = assumed.candidates if task_of(data).kind == "candidates" else 1
    return examples * (rows + data.decodes) * data.longest_row


def step_link_bytes(config: Config, size: ModelSize, tokens: float | None = None) -> float:
    """Payload over all links in one optimiser step, both directions.

    `tokens`: of all rows of the step with their padding, where that is known. The hidden states that a client sends,
    what comes back, its gradient, and the smashed activations' own if something in the client head learns.
    """
    if config.train.schedule == "centralised":
        return 0
    tokens = step_rows(config) * row_tokens(config) if tokens is None else tokens
    hidden = (4 if config.head_learns else 3) * tokens * size.hidden_size * size.value_bytes
    summed = 2 * config.train.clients if config.train.resolved_aggregation == "gradient" else 0
    return hidden + summed * size.client_learning * PARAMETER_BYTES


def run_link_bytes(config: Config, size: ModelSize, assumed: Assumptions) -> float:
    """Payload over all links in the whole run, both directions."""
    if config.train.schedule == "centralised":
        return 0
    scoring = 2 * evaluations(config) * evaluated_tokens(config, assumed) * size.hidden_size * size.value_bytes
    parts = size.client_learning * PARAMETER_BYTES
    shared = hand_overs(config) * 2 * STATE * parts + averages(config) * 2 * config.train.clients * parts
    return total_steps(config.train) * step_link_bytes(config, size) + scoring + shared


def hand_overs(config: Config) -> int:
    """From turn to turn, and of the last turn's client to all others (an evaluation on the way may need more)."""
    if not config.train.hands_over:
        return 0
    return math.ceil(total_steps(config.train) / config.train.sync_every) - 1 + config.train.clients - 1


def averages(config: Config) -> int:
    """Of the clients' parts."""
    if config.train.resolved_aggregation != "fedavg":
        return 0
    return math.ceil(total_steps(config.train) / config.train.sync_every)
