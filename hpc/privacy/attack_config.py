"""What `launch/attack.py` is told besides a run's own configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Optional

from hpc.privacy.attack_options import HijackOptions, InverterOptions, LabelOptions, OptimisationOptions
from hpc.rules import require, require_at_least


@dataclass(kw_only=True, frozen=True)
class CausalSearchConfig:
    """Attack (d), `causal_search`."""

    candidates: int = 1024
    """At most so many tokens are tried at each position, the likeliest first; 0: the whole vocabulary."""
    clear: float = 0.5
    """A position is done when one candidate's distance is below this share of the next one's; 0: only when nothing can
    be nearer, so that noise, or a head that has learned, makes each position cost all candidates."""

    def __post_init__(self) -> None:
        require_at_least("attack.causal_search.candidates", self.candidates, 0)
        require(0 <= self.clear < 1, f"--attack.causal_search.clear is {self.clear}; it must be at least 0 and below 1")


@dataclass(kw_only=True, frozen=True)
class AttackConfig:
    """Which attack, on what, by whom."""

    method: str = "nearest_embedding"
    """Name of the attack; an unknown one is refused with the list."""
    run_folder: Optional[str] = None
    """Output folder of a run that had --privacy.record_steps. None: the run that --config and the other flags describe
    is made first."""
    victim: int = 0
    """The client whose text is to be recovered."""
    colluder: Optional[int] = 1
    """The client that gives its data to the server: shadow data to learn from, and for the floors. null: nobody."""
    max_rows: int = 16
    """At most so many of the victim's rows are attacked; 0: all that were recorded."""
    first_step: int = 0
    """The victim's rows are those of this step (from 0) and later ones. In the first steps of a run a client's head is
    still the public one, or nearly, which makes an attack through the public blocks easier."""
    max_shadow_rows: int = 0
    """At most so many of the colluder's rows are used; 0: all that were recorded."""
    seed: int = 0
    """Of what the attack draws, and of the confidence intervals."""
    lm_floor: bool = True
    """Whether to work out the floor `lm_only`, which takes a pass of the whole model over the victim's rows."""
    causal_search: CausalSearchConfig = field(default_factory=CausalSearchConfig)
    """Options of `causal_search`."""
    inverter: InverterOptions = field(default_factory=InverterOptions)
    """Options of `inverter`, the paper's attack (b)."""
    optimisation: OptimisationOptions = field(default_factory=OptimisationOptions)
    """Options of `optimisation`, attack (c)."""
    label_inference: LabelOptions = field(default_factory=LabelOptions)
    """Options of `label_inference`, attack (f)."""
    fsha: HijackOptions = field(default_factory=HijackOptions)
    """Options of `fsha`, attack (e): a server that steers the run, so no run_folder goes with it."""

    def __post_init__(self) -> None:
        require_at_least("attack.victim", self.victim, 0)
        require_at_least("attack.max_rows", self.max_rows, 0)
        require_at_least("attack.first_step", self.first_step, 0)
        require_at_least("attack.max_shadow_rows", self.max_shadow_rows, 0)
        require_at_least("attack.seed", self.seed, 0)
        if self.colluder is not None:
            require_at_least("attack.colluder", self.colluder, 0)
        require(
            self.victim != self.colluder,
            f"--attack.victim and --attack.colluder are both client {self.victim}; name two, or --attack.colluder null",
        )
