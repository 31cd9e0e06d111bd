"""AdamW, its learning rate, clipping by the global norm over all parts, and the loss scale of fp16.

Everything here is a pure function of numbers that all roles know, so all roles decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hpc.config import TrainConfig

MAX_SKIPS = 10  # steps left out one after another, before a run that leaves steps out ends after all


def make_adamw(parameters: Iterable[torch.nn.Parameter], train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with the configuration's values."""
    return torch.optim.AdamW(
        list(parameters),
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )


def learning_rate(train: TrainConfig, step: int, steps: int) -> float:
    """Rate of optimiser step `step` (from 0) of `steps`: linear warm-up, then linear to 0, or constant."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    if train.lr_scheduler == "constant":
        return train.learning_rate
    return train.learning_rate * (steps - step) / max(1, steps - train.warmup_steps)


def set_learning_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def square_sum(gradients: Iterable[torch.Tensor | None]) -> float:
    """Sum of squares over tensors, in float64: a model that is cut elsewhere has its values in other tensors, and must
    still clip by the same float32 factor.
    """
    norms = (torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients if g is not None)
    return math.fsum(float(norm) ** 2 for norm in norms)


def global_norm(*square_sums: float) -> float:
    """Norm of the whole gradient from the parts' square sums."""
    return math.sqrt(sum(square_sums))


def clip_factor(norm: float, max_norm: float) -> float:
    """What to multiply every gradient with so that the global norm is at most `max_norm` (0: no clipping).

    The same formula as `torch.nn.utils.clip_grad_norm_`, 1e-6 included, and 1 below the bound.
    """
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm > 0 else 1.0


def scale_gradients(gradients: Iterable[torch.Tensor | None], factor: float) -> None:
    """Multiply in place; a factor of 1 touches nothing."""
    if factor != 1.0:
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor)


@dataclass(kw_only=True, frozen=True)
class Decision:
    """What every role does with a step's gradients: the same, as all know the same norm and loss scale."""

    norm: float
    """Global norm over all parts, loss scale taken out."""
    factor: float
    """What to multiply gradients with: clipping and loss scale."""
    rate: float
    """Learning rate."""

    @property
    def finite(self) -> bool:
        """False: nobody steps."""
        return math.isfinite(self.norm)


def decide(train: TrainConfig, *, scaled_norm: float, scale: float, step: int, steps: int) -> Decision:
    """From the norm of the gradients as they are (loss scale included) to what is done with them."""
    norm = scaled_norm / scale
    factor = clip_factor(norm, train.max_grad_norm) / scale if math.isfinite(norm) else 0.0
    return Decision(norm=norm, factor=factor, rate=learning_rate(train, step, steps))


@dataclass(kw_only=True)
class LossScale:
    """Dynamic loss scale of fp16 (Micikevicius et al., 2018); 1 and constant for the other precisions.

    The trunk ranks hold one each and feed it the same norms; clients are told its value in every step they take part
    in, since a client that waits for its turn does not see all norms.
    """

    value: float = 1.0
    dynamic: bool = False
    grow_every: int = 1000
    good_steps: int = 0

    @staticmethod
    def for_dtype(dtype: str) -> LossScale:
        return LossScale(value=2.0**14, dynamic=True) if dtype == "float16" else LossScale()

    def update(self, *, finite: bool) -> None:
        """Halve after an overflow, double after `grow_every` good steps."""
        if not self.dynamic:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good_steps % self.grow_every == 0:
            self.value *= 2

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"loss_scale": self.value, "good_steps": float(self.good_steps)}

    def load(self, state: Mapping[str, float]) -> None:
        """The inverse of `state`; an empty one changes nothing."""
        self.value = state.get("loss_scale", self.value)
        self.good_steps = int(state.get("good_steps", self.good_steps))
