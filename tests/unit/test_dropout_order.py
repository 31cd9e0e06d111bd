"""`pipelined`: what dropout draws in the trunk must not depend on whose micro-batch came first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from hpc.acts import Micro
from hpc.config import Config, TrainConfig
from hpc.programs import Traits
from hpc.schedule import TrainStep
from hpc.shared_step import SharedStep


class Drawing(SharedStep):
    """A step whose trunk does nothing but draw, as dropout does (from torch's global generator)."""

    def __init__(self, step: int) -> None:
        config = Config(train=TrainConfig(schedule="pipelined", micro_batches=2))
        self._side: Any = SimpleNamespace(train=config.train, traits=Traits.of(config))
        self._order = TrainStep(step=step, clients=(0, 1), batches=(0, 0))
        self.drawn: dict[Micro, tuple[float, ...]] = {}

    def arrive(self, *micros: Micro) -> dict[Micro, tuple[float, ...]]:
        for micro in micros:
            self._smashed = {micro: torch.zeros(3, 4)}
            self._headers = {micro: SimpleNamespace(lengths=(3,))}  # type: ignore[dict-item]
            self._out: dict[Micro, torch.Tensor] = {}
            self._forward((micro,))
        return self.drawn

    def _run_forward(self, batch: tuple[Micro, ...], smashed_BTD: torch.Tensor) -> torch.Tensor:
        self.drawn[batch[0]] = tuple(torch.rand(4).tolist())
        return smashed_BTD


def test_the_order_of_arrival_changes_nothing_that_is_drawn() -> None:
    a, b, c, d = Micro(0, 0), Micro(0, 1), Micro(1, 0), Micro(1, 1)
    one = Drawing(step=3).arrive(a, b, c, d)
    assert one == Drawing(step=3).arrive(c, a, d, b)
    assert len(set(one.values())) == 4
    assert one != Drawing(step=4).arrive(a, b, c, d)
