"""Epsilon against formulas worked out by hand, and releases against what a run really does."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from hpc.config import Config, DataConfig, PrivacyConfig, TrainConfig
from hpc.data.dataset import ClientData, EvalItem
from hpc.data.rows import Row
from hpc.privacy.defences.accounting import (
    Mechanism,
    Releases,
    most_loss,
    multiplier_for,
    plan,
    rows_of_held_out,
    rows_of_unit,
    uses,
)
from hpc.schedule import TrainStep, instructions


def analytic_epsilon(mu: float, delta: float) -> float:
    """Balle and Wang, 2018, theorem 8, for sensitivity / standard deviation = mu."""

    def excess(epsilon: float) -> float:
        first = math.exp(log_ndtr(mu / 2 - epsilon / mu))
        return first - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)) - delta

    return 0.0 if excess(0) <= 0 else float(brentq(excess, 0, mu * mu + 50 * mu + 50, xtol=1e-12))


def renyi_epsilon(mu: float, delta: float) -> float:
    """Mironov, 2017, in the form of Canonne, Kamath and Steinke, 2020, over many orders: an upper bound."""
    orders = [1 + 10 ** (k / 50) for k in range(-150, 150)]
    return min(a * mu * mu / 2 + math.log1p(-1 / a) - (math.log(delta) + math.log(a)) / (a - 1) for a in orders)


@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 7.0, 60.0])
def test_one_release_is_the_analytic_gaussian_mechanism(sigma: float, delta: float) -> None:
    """A row clipped to C may change by 2 C, and the noise is sigma * C."""
    found = Mechanism(rows=1, noise_multiplier=sigma).epsilon(Releases(smashed=1), delta)
    assert found == pytest.approx(analytic_epsilon(2 / sigma, delta), rel=1e-4)


@pytest.mark.parametrize(
    ("mechanism", "releases", "mu"),
    [
        # By hand: n releases of sensitivity s under noise of deviation d are one with mu = sqrt(n) s / d.
        (Mechanism(rows=1, noise_multiplier=4.0), Releases(smashed=16, gradients=9), math.sqrt(16) * 2 / 4),
        (Mechanism(rows=9, noise_multiplier=12.0), Releases(smashed=4), math.sqrt(4) * 2 * 3 / 12),
        (
            Mechanism(rows=1, noise_multiplier=4.0, gradient_noise_multiplier=8.0),
            Releases(smashed=16, gradients=9),
            math.sqrt(16 * (2 / 4) ** 2 + 9 * (2 / 8) ** 2),
        ),
        (Mechanism(rows=100, noise_multiplier=0.5), Releases(smashed=50), math.sqrt(50) * 20 / 0.5),
    ],
)
def test_releases_add_up_as_worked_out_by_hand(mechanism: Mechanism, releases: Releases, mu: float) -> None:
    assert mechanism.loss(releases) == pytest.approx(mu * mu)
    found = mechanism.epsilon(releases, 1e-5)
    assert found <= renyi_epsilon(mu, 1e-5) * 1.001
    if mu < 10:  # beyond, the formula's terms leave the range of floating point
        assert found == pytest.approx(analytic_epsilon(mu, 1e-5), rel=1e-4)
    else:
        assert found > mu * mu / 2  # where the loss has its mean


def test_a_known_value() -> None:
    """mu = 1 and delta = 1e-5, as printed in many places: 4.377."""
    assert Mechanism(rows=1, noise_multiplier=2.0).epsilon(Releases(smashed=1), 1e-5) == pytest.approx(4.377, abs=1e-3)


def test_nothing_released_costs_nothing() -> None:
    assert Mechanism(rows=1, noise_multiplier=1.0).epsilon(Releases(gradients=4), 1e-5) == 0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-5), (1.0, 1e-5), (8.0, 1e-9), (300.0, 1e-5), (1e4, 1e-6)])
def test_the_noise_that_a_budget_comes_to_just_keeps_it(epsilon: float, delta: float) -> None:
    releases, most = Releases(smashed=7, gradients=3), most_loss(epsilon, delta)
    for gradients in (False, True):
        sigma = multiplier_for(most, rows=5, releases=releases, gradients=gradients)
        mechanism = Mechanism(rows=5, noise_multiplier=sigma, gradient_noise_multiplier=sigma if gradients else 0.0)
        found = mechanism.epsilon(releases, delta)
        assert 0.998 * epsilon < found <= epsilon * (1 + 1e-4)


def data_of(client: int, rows: int, batch: int, seed: int = 0, val: Any = ()) -> ClientData:
    return ClientData(
        client_id=client,
        seed=seed,
        per_client_batch_size=batch,
        train_rows=[Row(ids=[1] * (5 + row), prompt_len=3) for row in range(rows)],
        val=[],
        val_items=list(val),
    )


@pytest.mark.parametrize(
    "train",
    [
        {"max_steps": 11, "eval_every": 3},
        {"max_steps": 20, "eval_before": False, "schedule": "serial", "clients": 3},
        {"rounds": 5, "sync_every": 2, "schedule": "replica", "clients": 3, "clients_per_round": 2},
        {"max_steps": 4, "schedule": "pipelined"},
    ],
)
@pytest.mark.parametrize("rows", [2, 5, 40])
def test_the_plan_is_the_most_that_any_example_is_used(train: dict[str, Any], rows: int) -> None:
    config = Config(train=TrainConfig(per_client_batch_size=3, **train), data=DataConfig(val_examples=4))
    for client in range(config.train.clients):
        data, used = data_of(client, rows, 3), Counter[int]()
        for instruction in instructions(config.train, evaluate=True):
            if isinstance(instruction, TrainStep) and client in instruction.clients:
                used.update(data.row_numbers(instruction.batch_of(client)))
        planned = plan(config, data, held_out_rows=2)
        assert planned.training.smashed == max(used.values(), default=0)
        assert planned.held_out.smashed == 2 * uses(config.train, client, evaluate=True)[1]


def test_evaluations_are_counted() -> None:
    train = TrainConfig(max_steps=10, eval_every=4)
    assert uses(train, 0, evaluate=True) == (10, 4)  # before the first step, after 4 and 8, and at the end
    assert uses(train, 0, evaluate=False) == (10, 0)


def test_a_prompt_is_released_with_each_choice_that_takes_a_row() -> None:
    several = data_of(0, 3, 1, val=[EvalItem(prompt=[1, 2], choices=[[3], [4, 5], [6]], gold=0)] * 3)
    single = data_of(0, 3, 1, val=[EvalItem(prompt=[1, 2], choices=[[3], [4]], gold=0)] * 3)
    assert [rows_of_held_out(each.eval_batches(4), decodes=False) for each in (several, single)] == [3, 1]
    assert [rows_of_held_out(each.eval_batches(4), decodes=True) for each in (several, single)] == [4, 2]
    assert rows_of_held_out([], decodes=False) == 0


def test_an_example_is_as_many_rows_as_the_longest_text_that_leaves() -> None:
    data = data_of(0, 4, 1, val=[EvalItem(prompt=[1] * 6, choices=[[3], [4, 5]], gold=0)])
    example = PrivacyConfig(clip_norm=1, noise_multiplier=1, unit="example")
    assert rows_of_unit(example, data, longest_answer=0) == 8
    assert rows_of_unit(example, data, longest_answer=16) == 22
    assert rows_of_unit(example, data_of(0, 9, 1), longest_answer=0) == 13
    assert rows_of_unit(PrivacyConfig(clip_norm=1, noise_multiplier=1), data, longest_answer=16) == 1
