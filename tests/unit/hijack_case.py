"""A real client of the tiny model over a loopback link, and a hostile trunk at the other end."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import torch

from hpc.client import Client
from hpc.config import AdapterConfig, Config
from hpc.data.dataset import load_client_data
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.hostile_trunk import HostileTrunk, MakesGradients
from hpc.programs import Traits
from hpc.report.events import EventLog
from hpc.schedule import TrainStep
from tests.loopback import channel_pair
from tests.unit.learned_case import config


def settings(method: str, *, head_blocks: int, rate: float, steps: int, name: str = "tiny-llama") -> Config:
    base = config(head_blocks=head_blocks, name=name)
    adapter = AdapterConfig(method=method, lora_r=8)  # type: ignore[arg-type]
    train = replace(base.train, clients=1, max_steps=steps, learning_rate=rate, schedule="serial")
    return replace(base, adapter=adapter, train=train)


def duel(
    run: Config, folder: Path, hijacker: MakesGradients | None, steps: int, *, careful: bool = True
) -> tuple[HostileTrunk, Client, list[BaseException]]:
    """`steps` training steps of client 0; what the client raised, if it did."""
    builder = ModelBuilder.of(run)
    head, tail = builder.client_parts()
    ours, theirs = channel_pair("aes-256-gcm")
    client = Client(
        client_id=0,
        config=run,
        head=head,
        tail=tail,
        data=load_client_data(run, 0, load_tokenizer(builder.resolver)),
        channel=ours,
        peers=None,
        log=EventLog(folder / "metrics.jsonl"),
        device=torch.device("cpu"),
        folder=folder,
    )
    part = builder.part("trunk", adapted=False).requires_grad_(False)
    trunk = HostileTrunk(
        channel=theirs, part=part, traits=Traits.of(run), client_id=0, hijacker=hijacker, careful=careful
    )
    orders = [TrainStep(step=step, clients=(0,), batches=(step,)) for step in range(steps)]
    failures: list[BaseException] = []

    def follow() -> None:
        try:
            for order in orders:
                client.train_step(order)
        except BaseException as error:
            failures.append(error)
            ours.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        for order in orders:
            trunk.serve(order)
    except BaseException as error:
        failures.append(error)
        theirs.close()
    thread.join(60)
    assert not thread.is_alive(), "the client hangs"
    return trunk, client, failures


def own_text(run: Config) -> list[list[int]]:
    """Rows of the server's own: the text of a client that is not there."""
    run = replace(run, train=replace(run.train, clients=2))
    data = load_client_data(run, 1, load_tokenizer(ModelBuilder.of(run).resolver))
    return [row.ids for row in data.train_rows]
