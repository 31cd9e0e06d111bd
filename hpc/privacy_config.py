"""What a run does for privacy: noise and its budget, and recordings for attacks. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Optional

from hpc.rules import require, require_at_least

_SIZES = ("clip_norm", "noise_multiplier", "noise_scale", "gradient_clip_norm", "gradient_noise_multiplier")


@dataclass(kw_only=True, frozen=True)
class PrivacyConfig:
    """What the server may learn, and what is recorded of it."""

    record_steps: int = 0
    """Of the first so many steps, each trunk rank keeps what it receives, and each client what was true, in
    recordings/ of the run's folder, for launch/attack.py. These files hold private text."""
    clip_norm: float = 0.0
    """Each token row of the smashed activations is scaled down to this L2 norm if it is longer; 0: not clipped."""
    noise_multiplier: float = 0.0
    """Gaussian noise on each value of the clipped smashed activations, in training, evaluation and generation: its
    standard deviation is noise_multiplier * clip_norm. 0: none, unless `epsilon` is given."""
    epsilon: Optional[float] = None
    """Privacy budget of one `unit` over all releases of the run, of which the noise multiplier is worked out; the run
    stops before it would be exceeded. It covers smashed activations, and returned gradients where these are noised."""
    delta: float = 1e-5
    """The probability that goes with epsilon, given or worked out."""
    unit: Literal["token", "example"] = "token"
    """What epsilon is said of: `token` is one row of the smashed activations, by itself (rows behind it in the text
    depend on the same token); `example` is all rows of an example, which takes more noise for the same epsilon."""
    noise_scale: float = 0.0
    """FedSEA's noise instead: standard deviation noise_scale * sqrt(pi / 2) on smashed activations that are not
    clipped, so no epsilon can be named. 0: none."""
    gradient_clip_norm: float = 0.0
    """Each token row of the gradient that goes back to the server is scaled down to this L2 norm (of the step's mean
    loss, without a loss scale); 0: not clipped."""
    gradient_noise_multiplier: float = 0.0
    """Gaussian noise on the clipped gradient that goes back; standard deviation gradient_noise_multiplier *
    gradient_clip_norm. With `epsilon` it is worked out, too. 0: none."""
    label_protection: Literal["none", "max_norm"] = "none"
    """`max_norm`: noise along each row of the gradient that goes back, so that norms no longer tell rows with a label
    from those without (Li et al., 2021). A heuristic that makes the gradient noisier; it promises no epsilon."""
    detector: Literal["off", "warn", "stop"] = "off"
    """Whether each client watches that the gradients which the trunk returns follow from those that it sent, and then
    logs a warning, or ends the run before it uses them. Needs a client head that learns: others get no gradient."""

    def __post_init__(self) -> None:
        require_at_least("privacy.record_steps", self.record_steps, 0)
        for name in _SIZES:
            require_at_least(f"privacy.{name}", getattr(self, name), 0)
            require(math.isfinite(getattr(self, name)), f"--privacy.{name} is not finite; give a number")
        given = self.epsilon is None or (self.epsilon > 0 and math.isfinite(self.epsilon))
        require(given, f"--privacy.epsilon is {self.epsilon}; it must be above 0 and finite")
        require(0 < self.delta < 1, f"--privacy.delta is {self.delta}; it must be above 0 and below 1")
        self._check_noise()

    def _check_noise(self) -> None:
        asked = "--privacy.noise_multiplier" if self.noise_multiplier else "--privacy.epsilon"
        require(
            self.epsilon is None or not (self.noise_multiplier or self.gradient_noise_multiplier),
            "--privacy.epsilon works the noise multipliers out; leave out --privacy.noise_multiplier and "
            "--privacy.gradient_noise_multiplier, or leave out --privacy.epsilon",
        )
        require(
            self.noise_scale == 0 or not self.clip_norm,
            f"--privacy.noise_scale {self.noise_scale} is for activations that are not clipped; with "
            "--privacy.clip_norm use --privacy.noise_multiplier",
        )
        require(
            not self.accounted or self.clip_norm > 0,
            f"{asked} without --privacy.clip_norm: noise protects only what is bounded; give a clip_norm above 0 (or "
            "--privacy.noise_scale for noise without a guarantee)",
        )
        require(
            self.gradient_noise_multiplier == 0 or self.gradient_clip_norm > 0,
            "--privacy.gradient_noise_multiplier without --privacy.gradient_clip_norm: noise protects only what is "
            "bounded; give a gradient_clip_norm above 0",
        )

    @property
    def accounted(self) -> bool:
        """Whether releases of smashed activations are counted, as an epsilon can be named."""
        return self.noise_multiplier > 0 or self.epsilon is not None

    @property
    def defends(self) -> bool:
        """Whether anything that leaves a client is changed."""
        return self.accounted or any(getattr(self, name) for name in _SIZES) or self.label_protection != "none"
