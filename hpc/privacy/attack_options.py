"""Options of the attacks that learn, optimise or match gradients. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Literal

from hpc.rules import require, require_at_least


@dataclass(kw_only=True, frozen=True)
class InverterOptions:
    """What learns, and for how long. The defaults of `gru` are SIP's, but for the output layer."""

    architecture: Literal["gru", "transformer"] = "gru"
    """Reads the activations of a row one after another (SIP), or all at once."""
    target: Literal["same", "next"] = "same"
    """The token at each position, or (as the published code has it) the one behind it."""
    bidirectional: bool = True
    """Whether it also reads from the right; never with target `next`, whose answer would stand there."""
    output: Literal["tied", "own"] = "tied"
    """`tied`: a direction in the public embedding table, which starts from the activation itself, so that few samples
    do. `own`: a linear layer that starts from nothing, as in SIP."""
    hidden: int = 256
    """Width of the GRU (each way) or of the transformer."""
    layers: int = 1
    """Of the GRU or of the transformer."""
    heads: int = 4
    """Attention heads of the transformer."""
    epochs: int = 20
    learning_rate: float = 1e-3
    """Of Adam."""
    batch_tokens: int = 512
    """Rows are taken together until they have so many tokens."""
    negatives: int = 4096
    """Tokens that a step's loss compares the true ones with, drawn anew for each step; 0: the whole vocabulary."""

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("layers", 1), ("heads", 1), ("epochs", 0), ("batch_tokens", 1)):
            require_at_least(f"attack.inverter.{name}", getattr(self, name), least)
        require(
            self.architecture == "gru" or self.hidden % (2 * self.heads) == 0,
            f"--attack.inverter.hidden {self.hidden} must be a multiple of twice --attack.inverter.heads {self.heads}",
        )

    @property
    def reads_back(self) -> bool:
        """Whether what is to the right of a position counts."""
        return self.bidirectional and self.target == "same"


@dataclass(kw_only=True, frozen=True)
class OptimisationOptions:
    """How long and how fast."""

    rounds: int = 3
    """After each but the last, a further share of the positions is held to its tokens."""
    steps: int = 60
    """Of Adam in each round."""
    learning_rate: float = 0.1
    """Of Adam, in units of the embedding table's own spread; it falls to 0 over each round."""
    warm_start_tokens: int = 4096
    """Random tokens that go through the public head, to learn the linear map back to embeddings that the first round
    starts from; 0: it starts from the activations themselves."""
    batch_rows: int = 8

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("steps", 1), ("warm_start_tokens", 0), ("batch_rows", 1)):
            require_at_least(f"attack.optimisation.{name}", getattr(self, name), least)


@dataclass(kw_only=True, frozen=True)
class LabelOptions:
    """Which labels are thought of."""

    candidates: List[int] = field(default_factory=list)
    """Token ids, such as those of a task's choices; empty: those of the whole vocabulary that fit best at first
    sight."""
    shortlist: int = 32
    """So many of the vocabulary are tried at each position."""
    gap: float = 3.0
    """Where the lengths of a row's gradients, in falling order, drop by this factor or more at once, labels end."""

    def __post_init__(self) -> None:
        require_at_least("attack.label_inference.shortlist", self.shortlist, 1)


@dataclass(kw_only=True, frozen=True)
class HijackOptions:
    """How fast the server's own networks learn, and what it dares."""

    hidden: int = 256
    """Width of the pilot's and of the discriminator's hidden layers."""
    learning_rate: float = 1e-3
    """Of Adam, for the discriminator."""
    pilot_learning_rate: float = 1e-4
    """Of Adam, for pilot and inverse: features that move faster than a client's head can follow are no use."""
    turns: int = 3
    """Steps of the discriminator for each gradient that is returned."""
    shadow_tokens: int = 1024
    """Tokens of the server's own text in each of these steps."""
    penalty: float = 1.0
    """Weight of the squared slope of the discriminator at true features (R1; Mescheder et al., 2018)."""
    careful: bool = True
    """Returns nothing behind the last position of a row that the client's gradient reaches, where an honest causal
    trunk could not; a detector finds a careless server in the first step."""

    def __post_init__(self) -> None:
        for name, least in (("hidden", 1), ("turns", 0), ("shadow_tokens", 1), ("penalty", 0)):
            require_at_least(f"attack.fsha.{name}", getattr(self, name), least)
