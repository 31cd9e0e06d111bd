"""What a trunk rank works with in every step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hpc.aggregate import TrunkGroup
from hpc.config import TrainConfig
from hpc.optim import LossScale
from hpc.privacy.recording import TrunkRecorder
from hpc.programs import Traits
from hpc.replica_trunk import ReplicaTrunk
from hpc.served import Served
from hpc.smashed_cache import SmashedCache
from hpc.stopwatch import Stopwatch
from hpc.trunk import Trunk


@dataclass(kw_only=True)
class ServerSide:
    """One trunk rank's blocks, clients and settings."""

    train: TrainConfig
    traits: Traits
    trunk: Trunk | ReplicaTrunk
    served: Served
    group: TrunkGroup
    loss_scale: LossScale
    steps: int
    """Optimiser steps of the whole run."""
    zero_BTD: torch.Tensor
    """What a rank without clients feeds the trunk, so that collective work goes on."""
    caches: dict[int, SmashedCache]
    """Client → its kept activations; empty without a cache."""
    watch: Stopwatch
    samples: list[int] = field(default_factory=list)
    """Training examples of every client, of all ranks."""
    part_values: int = 0
    """Values that learn in one client's parts."""
    recorder: TrunkRecorder | None = None
    """Keeps what is received, for attacks."""
    spent: set[int] = field(default_factory=set)
    """Clients whose privacy budget does not allow what comes next."""
    skipped: int = 0
    """Steps left out one after another, up to now."""

    @property
    def shared(self) -> Trunk:
        """The trunk, where all clients share its values."""
        assert isinstance(self.trunk, Trunk), "this schedule has a replica for each client"
        return self.trunk

    @property
    def replicas(self) -> ReplicaTrunk:
        """The trunk, where each client has values of its own."""
        assert isinstance(self.trunk, ReplicaTrunk), "this schedule has one trunk for all"
        return self.trunk
