"""A victim's real client, and a hostile trunk at the other end of its link, in two threads of this process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc.client import Client
from hpc.config import Config
from hpc.data.dataset import load_client_data
from hpc.errors import PeerLost, TrunkSuspected
from hpc.link.channel import Channel
from hpc.link.loopback import loopback_channels
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.hostile_trunk import HostileTrunk, MakesGradients
from hpc.programs import Traits
from hpc.report.events import EventLog, role_path
from hpc.schedule import TrainStep, instructions


@dataclass(kw_only=True, frozen=True)
class Duel:
    """What is left of it."""

    trunk: HostileTrunk
    client: Client
    suspected: TrunkSuspected | None
    """What the client ended the run with, if its detector did."""


def orders_of(config: Config, victim: int) -> list[TrainStep]:
    """The steps of the run that the victim is in, with nobody else in them."""
    steps = [each for each in instructions(config.train, evaluate=False) if isinstance(each, TrainStep)]
    return [
        TrainStep(step=order.step, clients=(victim,), batches=(order.batch_of(victim),))
        for order in steps
        if victim in order.clients
    ]


def duel(
    config: Config,
    folder: Path,
    hijacker: MakesGradients | None,
    orders: Sequence[TrainStep],
    *,
    victim: int = 0,
    careful: bool = True,
) -> Duel:
    """Carry `orders` out, until the client's detector ends it. `folder`: where the client writes its events.

    `hijacker` and `careful`: see `HostileTrunk`. Raises what either side raised first, but for that detector's alarm.
    """
    client_end, trunk_end = loopback_channels(config.link, (os.urandom(32), os.urandom(32)))
    client = _client(config, victim, client_end, folder)
    trunk = HostileTrunk(
        channel=trunk_end,
        part=ModelBuilder.of(config).part("trunk", adapted=False).requires_grad_(False),
        traits=Traits.of(config),
        client_id=victim,
        hijacker=hijacker,
        careful=careful,
    )
    failures: list[BaseException] = []

    def follow(work: Callable[[TrainStep], None], channel: Channel) -> None:
        try:
            for order in orders:
                work(order)
        except BaseException as error:
            failures.append(error)
            channel.close()

    thread = threading.Thread(target=follow, args=(client.train_step, client_end), daemon=True)
    thread.start()
    follow(trunk.serve, trunk_end)
    thread.join(config.link.timeout_s)
    if thread.is_alive():
        raise PeerLost(f"client {victim} did not end its last step within {config.link.timeout_s:g} s")
    suspected = failures[0] if failures else None
    if suspected is not None and not isinstance(suspected, TrunkSuspected):
        raise suspected
    return Duel(trunk=trunk, client=client, suspected=suspected)


def _client(config: Config, client_id: int, channel: Channel, folder: Path) -> Client:
    builder = ModelBuilder.of(config)
    head, tail = builder.client_parts()
    return Client(
        client_id=client_id,
        config=config,
        head=head,
        tail=tail,
        data=load_client_data(config, client_id, load_tokenizer(builder.resolver)),
        channel=channel,
        peers=None,
        log=EventLog(role_path(folder, f"client-{client_id}")),
        device=torch.device("cpu"),
        folder=folder,
    )
