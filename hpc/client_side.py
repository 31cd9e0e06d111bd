"""What a client works with in every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc.config import TrainConfig
from hpc.data.collate import Batch
from hpc.learner import Learner
from hpc.link.peers import PeerKeys
from hpc.model.part import LabelPositions, Part
from hpc.privacy.defences.detector import Detector
from hpc.privacy.defences.shield import Shield
from hpc.privacy.recording import ClientRecorder
from hpc.programs import Traits
from hpc.smashed_cache import CacheBook
from hpc.stopwatch import Stopwatch
from hpc.trunk_link import TrunkLink


@dataclass(kw_only=True, frozen=True)
class ClientSide:
    """One client's parts, link and settings."""

    client_id: int
    train: TrainConfig
    traits: Traits
    head: Part
    tail: Part
    learner: Learner
    link: TrunkLink
    peers: PeerKeys | None
    book: CacheBook | None
    """Which of this client's rows the server's cache holds; None without a cache."""
    steps: int
    """Optimiser steps of the whole run."""
    skips: bool
    """A step that is not finite is left out, instead of ending the run."""
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    watch: Stopwatch
    shield: Shield
    """What is done to all that leaves."""
    recorder: ClientRecorder | None = None
    """Keeps what is true of each batch, for attacks."""
    detector: Detector | None = None
    """Watches what the trunk returns."""

    def labels(self, batch: Batch) -> tuple[LabelPositions, torch.Tensor]:
        """Where the batch's labels are, and what, on the device."""
        positions = LabelPositions(
            row_L=batch.label_rows_L.to(self.device), position_L=batch.label_positions_L.to(self.device)
        )
        return positions, batch.label_ids_L.to(self.device)
