"""What programs are made of (`hpc.programs`): what a role sends, waits for, or computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hpc.link.kinds import Kind


class Micro(NamedTuple):
    """One piece of a client's batch; with one piece, the batch."""

    client: int
    piece: int = 0


@dataclass(frozen=True)
class Send:
    """Send a frame; on the client, to its trunk rank, on the trunk, to `micro.client`."""

    kind: Kind
    micro: Micro


@dataclass(frozen=True)
class Recv:
    """Wait for this frame."""

    kind: Kind
    micro: Micro


@dataclass(frozen=True)
class RecvAny:
    """Take whichever of these frames comes first; the executor answers with it.

    Unless `wait`, the executor may answer None if none has come yet. It answers `Lost` if a client is gone.
    """

    awaited: tuple[Recv, ...]
    wait: bool


@dataclass(frozen=True)
class Lost:
    """An answer: this client will send nothing more."""

    client: int


@dataclass(frozen=True)
class HeadForward:
    micro: Micro


@dataclass(frozen=True)
class TailStep:
    """Forward through the tail, loss, and back to the gradient of `trunk_out`."""

    micro: Micro


@dataclass(frozen=True)
class HeadBackward:
    micro: Micro


@dataclass(frozen=True)
class Forward:
    """Through the trunk, all of `batch` at once; the results are kept until they are sent."""

    batch: tuple[Micro, ...]


@dataclass(frozen=True)
class Backward:
    batch: tuple[Micro, ...]


@dataclass(frozen=True)
class Combine:
    """Every frame of this kind is here: work out, with the other trunk ranks, what follows from them."""

    kind: Kind


@dataclass(frozen=True)
class Step:
    """Optimiser step, or (after an average) take the new parameters up."""


ClientAct = Send | Recv | HeadForward | TailStep | HeadBackward | Step
TrunkAct = Send | Recv | RecvAny | Forward | Backward | Combine | Step
