"""Where the model is cut: which part owns which blocks (paper section 3.1; DESIGN words: head, trunk, tail)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc.errors import ConfigError

PartKind = Literal["head", "trunk", "tail", "whole"]


@dataclass(kw_only=True, frozen=True)
class PartSpec:
    """One part: blocks `first` to `last` (exclusive) of the whole model, and what surrounds them."""

    kind: PartKind
    first: int
    last: int

    @property
    def owns_embedding(self) -> bool:
        return self.kind in ("head", "whole")

    @property
    def owns_lm_head(self) -> bool:
        return self.kind in ("tail", "whole")

    @property
    def blocks(self) -> int:
        return self.last - self.first


@dataclass(kw_only=True, frozen=True)
class Cut:
    """A model of `blocks` transformer blocks, cut after `head_blocks` and before the last `tail_blocks`."""

    blocks: int
    head_blocks: int
    tail_blocks: int

    def __post_init__(self) -> None:
        if self.head_blocks + self.tail_blocks >= self.blocks:
            raise ConfigError(
                f"--model.head_blocks {self.head_blocks} and --model.tail_blocks {self.tail_blocks} leave no trunk: "
                f"the model has {self.blocks} blocks, so their sum must be at most {self.blocks - 1}"
            )

    def part(self, kind: PartKind) -> PartSpec:
        """The blocks of a part; `whole` is the uncut model."""
        tail_first = self.blocks - self.tail_blocks
        first, last = {
            "head": (0, self.head_blocks),
            "trunk": (self.head_blocks, tail_first),
            "tail": (tail_first, self.blocks),
            "whole": (0, self.blocks),
        }[kind]
        return PartSpec(kind=kind, first=first, last=last)

    def kind_of_block(self, block: int) -> PartKind:
        """The part that owns a block of the whole model."""
        if block < self.head_blocks:
            return "head"
        return "trunk" if block < self.blocks - self.tail_blocks else "tail"
