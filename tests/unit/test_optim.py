"""Learning rate, clipping and loss scale against PyTorch's own."""

from __future__ import annotations

import math

import pytest
import torch

from hpc.config import TrainConfig
from hpc.optim import LossScale, clip_factor, global_norm, learning_rate, scale_gradients, square_sum


def test_linear_schedule_equals_transformers() -> None:
    from transformers import get_linear_schedule_with_warmup

    train = TrainConfig(learning_rate=0.3, warmup_steps=0)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_linear_schedule_with_warmup(optimiser, 0, 10)
    for step in range(10):
        assert learning_rate(train, step, 10) == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-12)
        optimiser.step()
        scheduler.step()


def test_warm_up_rises_to_the_peak_and_every_step_learns() -> None:
    train = TrainConfig(learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate(train, step, 8) for step in range(8)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(rate > 0 for rate in rates)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clipping_equals_pytorchs(max_norm: float) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ours = [p.grad.clone() for p in parameters if p.grad is not None]
    norm = global_norm(square_sum(ours[:2]), square_sum(ours[2:]))
    scale_gradients(ours, clip_factor(norm, max_norm))
    theirs = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    assert norm == pytest.approx(float(theirs), rel=1e-6)
    for mine, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(mine, parameter.grad)


def test_a_gradient_in_other_pieces_clips_by_the_same_float32_factor() -> None:
    """A prefix is one tensor for each part, so a cut elsewhere has the same values in other pieces."""
    for seed in range(20):
        gradient = torch.randn(6, 4097, generator=torch.Generator().manual_seed(seed))
        whole = clip_factor(global_norm(square_sum([gradient])), 0.5)
        pieces = clip_factor(global_norm(square_sum([gradient[:1]]), square_sum([gradient[1:], None])), 0.5)
        assert torch.equal(torch.tensor(whole), torch.tensor(pieces))
        assert global_norm(square_sum([gradient])) == pytest.approx(
            math.sqrt(math.fsum(value**2 for value in gradient.flatten().tolist())), rel=1e-14
        )


def test_no_bound_means_no_clipping() -> None:
    assert clip_factor(1e9, 0.0) == 1.0


def test_a_missing_gradient_counts_as_zero() -> None:
    assert square_sum([None, torch.tensor([3.0, 4.0])]) == 25.0


def test_not_finite_survives_the_sum() -> None:
    assert math.isnan(square_sum([torch.tensor([math.nan])]))
    assert math.isinf(square_sum([torch.tensor([math.inf])]))


def test_loss_scale_halves_and_grows() -> None:
    scale = LossScale.for_dtype("float16")
    start = scale.value
    scale.update(finite=False)
    assert scale.value == start / 2
    for _ in range(scale.grow_every):
        scale.update(finite=True)
    assert scale.value == start
    fixed = LossScale.for_dtype("bfloat16")
    fixed.update(finite=False)
    assert fixed.value == 1.0
