"""What stands between a client's values and its link: clipping, noise, label protection, and the account of it.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hpc.config import PrivacyConfig
from hpc.errors import CheckpointError
from hpc.privacy.defences.account import RELEASED, Account
from hpc.privacy.defences.noise import FreshNoise, equal_norms, fedsea_std, released


class Shield:
    """Of one client; with a configuration that defends nothing, all goes through as it is, to the bit."""

    def __init__(
        self, config: PrivacyConfig, *, noise_multiplier: float | None = None, account: Account | None = None
    ) -> None:
        """`noise_multiplier`: what `config.epsilon` came to (None: none is given); `account`: who counts."""
        self.config, self.account, self._source = config, account, FreshNoise()
        self.noise_multiplier, self.gradient_noise_multiplier = (
            config.noise_multiplier,
            config.gradient_noise_multiplier,
        )
        if noise_multiplier is not None:
            self.noise_multiplier = noise_multiplier
            self.gradient_noise_multiplier = noise_multiplier if config.gradient_clip_norm else 0.0
        self._std = self.noise_multiplier * config.clip_norm or fedsea_std(config.noise_scale)

    def smashed(self, smashed_BTD: torch.Tensor) -> torch.Tensor:
        """What leaves instead of these smashed activations; part of their graph."""
        return released(smashed_BTD, self._source, clip_norm=self.config.clip_norm, std=self._std)

    def gradient(self, grad_BTD: torch.Tensor, lengths: Sequence[int], *, loss_scale: float) -> torch.Tensor:
        """What goes back instead of this gradient, which is `loss_scale` times the one that is clipped."""
        norm = self.config.gradient_clip_norm
        sent_BTD = grad_BTD
        if self.config.label_protection == "max_norm":
            sent_BTD = equal_norms(sent_BTD, self._source, tuple(lengths))
        if norm:
            # The server chooses the scale: of a tiny one, the squares would vanish, and with them the clipping.
            plain_BTD = sent_BTD.float() / loss_scale
            std = self.gradient_noise_multiplier * norm
            sent_BTD = released(plain_BTD, self._source, clip_norm=norm, std=std) * loss_scale
        return sent_BTD.to(grad_BTD.dtype)

    def keeps_all_of(self, exact: torch.Tensor, clip_norm: float) -> bool:
        """False where clipping to `clip_norm` (0: not) takes out what is not finite: the trunk cannot see it then."""
        return not clip_norm or bool(exact.isfinite().all())

    def training(self, step: int, rows: Sequence[int], sent: Sequence[int]) -> None:
        """Before training rows leave: `sent`, of those in the piece. Raises `BudgetSpent`."""
        if self.account is not None:
            self.account.training(step, rows, sent)

    def evaluation(self, step: int) -> None:
        """Before the held-out examples leave. Raises `BudgetSpent`."""
        if self.account is not None:
            self.account.evaluation(step)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {} if self.account is None else self.account.state()

    def check(self, facts: Mapping[str, float]) -> None:
        """Raise `CheckpointError` if a checkpoint with these facts cannot be gone on from with this configuration."""
        if self.account is not None:
            self.account.check(facts)
        elif RELEASED in facts:
            raise CheckpointError(
                "the checkpoint is of a run whose releases were counted, with noise; give the same --privacy settings"
            )

    def figures(self) -> dict[str, Any]:
        """For the events; `epsilon` is None where none can be named."""
        config = self.config
        return {
            "unit": config.unit,
            "clip_norm": config.clip_norm,
            "noise_multiplier": self.noise_multiplier,
            "noise_scale": config.noise_scale,
            "gradient_clip_norm": config.gradient_clip_norm,
            "gradient_noise_multiplier": self.gradient_noise_multiplier,
            "label_protection": config.label_protection,
            "epsilon": None,
            **({} if self.account is None else self.account.figures()),
        }


OPEN = Shield(PrivacyConfig())
"""Lets everything through."""
