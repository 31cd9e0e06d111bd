"""Runs of the tiny model for a hostile trunk to steer, and text of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hpc.config import AdapterConfig, Config
from hpc.data.dataset import load_client_data
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy import duel as played
from hpc.privacy.duel import Duel, orders_of
from hpc.privacy.hostile_trunk import MakesGradients
from tests.unit.learned_case import config


def settings(method: str, *, head_blocks: int, rate: float, steps: int, name: str = "tiny-llama") -> Config:
    base = config(head_blocks=head_blocks, name=name)
    adapter = AdapterConfig(method=method, lora_r=8)  # type: ignore[arg-type]
    train = replace(base.train, clients=1, max_steps=steps, learning_rate=rate, schedule="serial")
    return replace(base, adapter=adapter, train=train)


def duel(
    run: Config, folder: Path, hijacker: MakesGradients | None, steps: int | None = None, *, careful: bool = True
) -> Duel:
    """The first `steps` training steps of client 0; None: all."""
    return played.duel(run, folder, hijacker, orders_of(run, 0)[:steps], careful=careful)


def own_text(run: Config) -> list[list[int]]:
    """Rows of the server's own: the text of a client that is not there."""
    run = replace(run, train=replace(run.train, clients=2))
    data = load_client_data(run, 1, load_tokenizer(ModelBuilder.of(run).resolver))
    return [row.ids for row in data.train_rows]
