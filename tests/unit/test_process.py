"""What a role's process tells the libraries that read the environment."""

from __future__ import annotations

import os

import pytest

from hpc.config import Config, RunConfig, TrainConfig, TrunkConfig
from hpc.process import prepare_process
from hpc.topology import place, read_world


@pytest.mark.parametrize(("rank", "world"), [("0", "2"), ("1", "2"), ("2", "5")])
def test_a_trunk_ranks_world_is_the_trunk(rank: str, world: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed compares its process group with WORLD_SIZE; a client has no such group."""
    config = Config(trunk=TrunkConfig(ranks=2), train=TrainConfig(clients=3), run=RunConfig(device="cpu", threads=1))
    for name, value in (("RANK", rank), ("WORLD_SIZE", "5"), ("LOCAL_RANK", rank)):
        monkeypatch.setenv(name, value)
    prepare_process(config, place(read_world(os.environ), config))
    assert os.environ["WORLD_SIZE"] == world
