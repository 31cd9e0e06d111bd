"""What dropout draws in the trunk depends neither on whose micro-batch came first nor on other roles' draws."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpc.acts import Micro
from hpc.config import Config, TrainConfig
from hpc.programs import Traits
from hpc.schedule import TrainStep
from hpc.shared_step import SharedStep


class Drawing(SharedStep):
    """A step whose trunk does nothing but draw, as dropout does (from torch's global generator)."""

    def __init__(self, step: int, schedule: str = "pipelined") -> None:
        config = Config(train=TrainConfig(schedule=schedule, micro_batches=2 if schedule == "pipelined" else 1))
        self._side: Any = SimpleNamespace(train=config.train, traits=Traits.of(config), group=SimpleNamespace(rank=0))
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


@pytest.mark.parametrize("schedule", ["serial", "client_batch", "pipelined"])
def test_what_another_role_of_the_process_seeds_before_the_pass_changes_nothing(schedule: str) -> None:
    drawn = []
    for elsewhere in (0, 1):
        step = Drawing(step=3, schedule=schedule)
        torch.manual_seed(elsewhere)
        drawn.append(step.arrive(Micro(0, 0)))
    assert drawn[0] == drawn[1]
