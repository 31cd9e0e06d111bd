"""Generation as roles of their own: a trunk process that serves, and a client that asks, as each other's peers only.

`split_model` is the client in this process with a trunk that it starts on this machine.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import yaml

from hpc.acts import Micro, Recv
from hpc.agreement import agreement
from hpc.config import Config
from hpc.errors import HpcError, LinkError
from hpc.federation import closing_links
from hpc.last_words import leave_last_words
from hpc.launcher import beside
from hpc.link.broken import lost_if_broken
from hpc.link.channel import Channel
from hpc.link.connect import open_client_channel, open_server_channel
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from hpc.model.continued import ContinuedLM, context_of
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.defences.prepare import shield_to_generate
from hpc.privacy.defences.telling import told_of_prompts
from hpc.process import device_of, prepare_process
from hpc.rendezvous import Rendezvous
from hpc.report.events import EventLog
from hpc.served import Served
from hpc.served_decoding import PlainTrunk, ServedDecoding
from hpc.split_chain import SplitChains
from hpc.topology import Place
from hpc.trained import Source, Wanted, source_of, take_up
from hpc.trunk_link import TrunkLink

log = logging.getLogger("hpc")

REST_S = 10.0
UNLIMITED = 2**16 - 1  # columns: what a header can say of a row


def for_generation(config: Config) -> Config:
    """What generation leaves of a run's configuration: one trunk rank, and no state of the run's."""
    return replace(
        config,
        trunk=replace(config.trunk, ranks=1, deepspeed=None, smashed_cache_mib=0.0),
        run=replace(config.run, baseline_steps=0, resume_from_checkpoint=None),
    )


def serve(config: Config, place: Place, clients: Sequence[int], trained: str | None, wanted: Wanted = "auto") -> None:
    """The trunk's role: continue the rows of `clients` until all have had enough. A lost one harms nobody else.

    `trained`: the folder of the run whose trained values the trunk has (the first client's, where each has its own);
    none: the model as published.
    """
    prepare_process(config, place)
    source = source_of(trained, config, clients[0], wanted) if trained else None
    meeting, channels = Rendezvous(place, config), dict[int, Channel]()
    with closing_links(channels):
        for client in clients:
            channels[client], _ = open_server_channel(
                meeting.link(client), link=config.link, client_id=client, agreement=_agreed(config, source)
            )
        builder = ModelBuilder.of(config)
        part = builder.part("trunk", adapted=source is not None)
        if source is not None:
            take_up([part], source, config, role="trunk")
        device = device_of(config, place)
        part.to(device).eval()
        served = Served(
            config=config,
            channels=channels,
            device=device,
            hidden_size=builder.hidden_size,
            dtype=builder.dtype,
            log=EventLog(os.devnull),  # there is no run to report on
            asked=True,
            described=part.needs_layout,
        )
        context = context_of(builder.hf_config) or UNLIMITED

        def farewell(client: int) -> None:
            served.recv(Recv(Kind.BYE, Micro(client)), 0, on_device=False)  # it ends the thread that reads the link
            served.send(client, Header(kind=Kind.BYE))

        limit = config.trunk.generation_bytes
        ServedDecoding(served, PlainTrunk(part), context=context, limit_bytes=limit).serve(clients, farewell)
        served.flush()


@contextmanager
def asking(config: Config, place: Place, trained: str | None, wanted: Wanted = "auto") -> Iterator[ContinuedLM]:
    """The client's role: its own parts, and the trunk at the other end of its link. The model has a `tokenizer`."""
    prepare_process(config, place)
    source = source_of(trained, config, place.index, wanted) if trained else None
    shield = shield_to_generate(config, trained, place.index)
    if config.privacy.defends:
        log.info("%s", told_of_prompts(shield.figures(), config))
    meeting, channels = Rendezvous(place, config), dict[int, Channel]()
    with closing_links(channels), lost_if_broken("the trunk is gone or silent"):
        channels[0], _ = open_client_channel(
            meeting.link(place.index), link=config.link, client_id=place.index, agreement=_agreed(config, source)
        )
        builder = ModelBuilder.of(config)
        head, tail = builder.client_parts(adapted=source is not None)
        if source is not None:
            take_up([head, tail], source, config, role=place.name)
        device = device_of(config, place)
        link = SteadyLink(channels[0], client_id=place.index, device=device)
        chains = SplitChains(head.to(device).eval(), tail.to(device).eval(), link, shield)
        model = ContinuedLM(builder.hf_config, chains.open, device=device, folder=builder.resolver.name_or_path)
        model.tokenizer = load_tokenizer(builder.resolver)
        model.tokenizer.padding_side = "left"
        try:
            yield model
            chains.enough()
            link.send(Header(kind=Kind.BYE))
            link.recv_next(Kind.BYE)
        finally:
            link.rest()


def _agreed(config: Config, source: Source | None) -> dict[str, str]:
    """Both ends must have taken up the same moment of the run."""
    return {**agreement(config), "generation.source": source.name if source else "the model as published"}


class SteadyLink(TrunkLink):
    """A link whose client may think for long between two requests: the trunk hears that it is still there."""

    def __init__(self, channel: Channel, *, client_id: int, device: torch.device) -> None:
        # A thread reads, so that sending touches nothing of what comes: two threads send.
        super().__init__(channel, client_id=client_id, device=device, reads_ahead=True)
        self._sending, self._resting = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._stay, args=(channel.timeout_s / 4,), name="alive", daemon=True)
        self._thread.start()

    def send(self, header: Header, tensor: torch.Tensor | None = None) -> None:
        with self._sending:
            super().send(header, tensor)

    def rest(self) -> None:
        """No more signs of life."""
        self._resting.set()
        self._thread.join(REST_S)

    def _stay(self, every_s: float) -> None:
        while not self._resting.wait(every_s):
            with suppress(LinkError):  # whoever asks next hears of it
                self.send(Header(kind=Kind.ALIVE))


@contextmanager
def split_model(
    config: Config, *, client: int = 0, trained: str | None = None, wanted: Wanted = "auto"
) -> Iterator[ContinuedLM]:
    """The cut model to generate with: this process is `client`, and the trunk is a process that it starts.

    `with split_model(config) as model: model.generate(**model.tokenizer(text, return_tensors="pt"))`. `trained`: a
    run's folder. Raises as `ModelBuilder.of` does, `IdentityError`, `RoleFailed` with the trunk's own words.
    """
    config = for_generation(config)
    with tempfile.TemporaryDirectory(prefix="hpc-") as folder:
        told = Path(folder) / "config.yaml"
        told.write_text(yaml.safe_dump(asdict(config)))
        command = [sys.executable, "-m", "hpc.generate", str(told), str(client), trained or "", wanted]
        with beside(config, command) as world:
            place = Place(role="client", index=client, world=world)
            with asking(config, place, trained, wanted) as model:
                yield model


def _serve_as_child(told: str, client: str, trained: str, wanted: Wanted) -> int:
    """The trunk's process of `split_model`; its last words go to the process that started it."""
    from hpc.cli import make_parser, parse
    from hpc.topology import read_world

    place = Place(role="trunk", index=0, world=read_world(os.environ))
    try:
        config, _ = parse(make_parser(str(__doc__)), ["--config", told])
        serve(config, place, [int(client)], trained or None, wanted)
    except HpcError as error:
        leave_last_words(place.name, str(error), error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os._exit(_serve_as_child(*sys.argv[1:]))  # type: ignore[arg-type]  # the links' threads may wait for a peer that is gone
