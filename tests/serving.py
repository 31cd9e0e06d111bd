"""A trunk that serves generation in a thread, and its clients' models: real frames, real cipher, no processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hpc.config import Config
from hpc.errors import LinkError
from hpc.link.channel import Channel
from hpc.model.build import ModelBuilder
from hpc.model.continued import ContinuedLM
from hpc.report.events import EventLog
from hpc.served import Served
from hpc.served_decoding import PlainTrunk, ServedDecoding
from hpc.split_chain import SplitChains
from hpc.trunk_link import TrunkLink
from tests.loopback import channel_pair

CPU = torch.device("cpu")
CONTEXT = 64
LIMIT = 2**20


@dataclass
class Serving:
    """A trunk in a thread, and the clients' models."""

    models: list[ContinuedLM]
    channels: list[Channel]
    plain: Any
    chains: list[SplitChains]
    failures: list[BaseException] = field(default_factory=list)


def serving(
    config: Config,
    clients: int,
    *,
    prepare: Callable[[Any], None] = lambda part: None,
    timeout_s: float = 20,
    limit_bytes: int = LIMIT,
) -> Iterator[Serving]:
    builder = ModelBuilder.of(config)
    pairs = [channel_pair("aes-256-gcm", timeout_s=timeout_s) for _ in range(clients)]
    trunk = builder.part("trunk").eval()
    prepare(trunk)
    config = replace(config, link=replace(config.link, timeout_s=timeout_s))
    served = Served(
        config=config,
        channels={k: pair[1] for k, pair in enumerate(pairs)},
        device=CPU,
        hidden_size=builder.hidden_size,
        dtype=builder.dtype,
        log=EventLog(os.devnull),
        asked=True,
        described=trunk.needs_layout,
    )
    found = Serving(models=[], channels=[pair[0] for pair in pairs], plain=None, chains=[])
    folder = builder.resolver.name_or_path
    for k, (channel, _) in enumerate(pairs):
        head, tail = builder.client_parts()
        for part in (head.eval(), tail.eval()):
            prepare(part)
        link = TrunkLink(channel, client_id=k, device=CPU, reads_ahead=False)
        found.chains.append(SplitChains(head, tail, link))
        found.models.append(ContinuedLM(builder.hf_config, found.chains[-1].open, device=CPU, folder=folder))
    found.plain = AutoModelForCausalLM.from_pretrained(folder).eval()

    def serve() -> None:
        try:
            ServedDecoding(served, PlainTrunk(trunk), context=CONTEXT, limit_bytes=limit_bytes).serve(range(clients))
        except BaseException as error:
            found.failures.append(error)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield found
    for k in served.present(range(clients)):
        with suppress(LinkError):  # the test may have ended this link
            found.chains[k].enough()
    thread.join(30)
    assert not thread.is_alive(), "the trunk still waits"
    assert not found.failures
