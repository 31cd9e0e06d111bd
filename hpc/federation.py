"""Run one role of a federation, from its place in the world to its last event."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hpc.aggregate import TrunkGroup
from hpc.agreement import agreement
from hpc.baseline import run_baseline
from hpc.checkpoint import Attempt
from hpc.config import Config
from hpc.export.save import forget_adapter
from hpc.last_words import leave_ending
from hpc.link.broken import lost_if_broken
from hpc.link.channel import Channel
from hpc.link.connect import open_client_channel
from hpc.link.identity import Authorised, client_name, load_private
from hpc.logs import begin_file, ended_well, terminal_line
from hpc.model.build import ModelBuilder, count_parameters
from hpc.model.pretrained import load_tokenizer
from hpc.opening import Opening, close_links, facts_of_run, folder_told
from hpc.process import device_of, prepare_process
from hpc.rendezvous import Rendezvous, made_up_folder, start_of, trunk_patience_s
from hpc.report.events import Ended, EventLog, Started, role_path
from hpc.report.provenance import peak_rss_mib, versions
from hpc.schedule import clients_of_step, total_steps
from hpc.stopping import StopRequest
from hpc.topology import Place
from hpc.turns import TURNS, step_hooks

log = logging.getLogger("hpc")


def run_role(config: Config, place: Place, yaml: str, *, stop: StopRequest | None = None) -> None:
    """Run this process's role to its end. `yaml`: the resolved configuration, saved beside the results.

    `stop`: whether it was asked to end at the next step. Raises `Paused` if it did.
    """
    prepare_process(config, place)
    stop = stop or StopRequest()
    if place.role == "centralised":
        why = run_centralised(config, yaml, stop)
    elif place.role == "baseline":
        why = run_baseline(config, Rendezvous(place, config))
    elif place.role == "trunk":
        why = run_trunk(config, place, yaml, stop)
    else:
        why = run_client(config, place, stop)
    ended_well(why)
    if place.name in ("trunk-0", "centralised"):
        leave_ending(terminal_line(f"run ended: {why}"))


def run_trunk(config: Config, place: Place, yaml: str, stop: StopRequest) -> str:
    """One trunk rank: links, blocks on DeepSpeed, the rounds, and (rank 0) the report. Returns how it ended."""
    from hpc.build_trunk import build_trunk
    from hpc.report.progress import Progress
    from hpc.server import Server

    meeting = Rendezvous(place, config)
    folder = Path(meeting.output_folder())
    # Told before the first link opens: whoever is linked must not wait for it while another client is refused.
    start, attempt, _ = meeting.take_up(folder)
    events = EventLog(role_path(folder, place.name))
    with (
        Opening(meeting, config, events, facts=facts_of_run(folder)) as links,
        lost_if_broken("another trunk rank is gone or silent"),
    ):
        links.open()
        device = device_of(config, place)
        builder = ModelBuilder.of(config)
        meeting.open_trunk_group(device)
        group = TrunkGroup(place.index, config.trunk.ranks, trunk_patience_s(config))
        part = builder.part("trunk")
        keys_read = len(builder.source.keys_read)
        trunk, facts = build_trunk(
            part, config, rank=place.index, device=device, folder=folder, start=start, attempt=attempt
        )
        reports = place.index == 0
        server = Server(
            config=config,
            trunk=trunk,
            channels=links.channels,
            group=group,
            hidden_size=builder.hidden_size,
            dtype=builder.dtype,
            log=events,
            folder=folder,
            start=start,
            attempt=attempt,
            admission=links.admission,
            stop_asked=stop,
            check_key=links.check_key,
            before_pause=lambda: turns.give_up(),
        )
        links.served = server.served
        server.loss_scale.load(facts)
        server.open()
        stop.begin()
        # Every role is up: only now is anything written.
        begin_file(folder)
        if reports:
            save_config(folder, yaml)
            if config.run.baseline_steps and TURNS not in os.environ and not start:
                log.warning("--run.baseline_steps is left out: it needs launch/local.py as a single process")
        log_begin(config, start)
        events.write(Started(step=start))
        links.began()
        per_step = len(clients_of_step(config.train, 0))
        progress = Progress(
            folder, total_steps=total_steps(config.train), clients_per_step=per_step, form=terminal_line
        )

        def payload() -> dict[str, float]:
            stats = server.served.stats()
            return {"payload": stats.payload_bytes_sent + stats.payload_bytes_received}

        turns = step_hooks(config, place.name, store=meeting.store, log=events, meter=payload)

        done = start

        def after_step(step: int) -> None:
            nonlocal done
            done = step + 1
            if reports:
                progress.poll()

        server.run(after_step, turns.before_step)
        turns.finish()
        parameters = {"trunk": {"owned": trunk.owned, "trainable": trunk.trainable}}
        events.write(_ended(parameters, keys_read, meeting.transport_name))
        group.barrier()
        if reports:
            progress.close()
            report(config, folder)
    torch.distributed.destroy_process_group()
    return finished(config, done, folder)


def run_client(config: Config, place: Place, stop: StopRequest) -> str:
    """One client: link, its own data, head and tail, the rounds. Returns how it ended."""
    from hpc.client import Client
    from hpc.data.dataset import load_client_data
    from hpc.link.peers import PeerKeys

    meeting = Rendezvous(place, config)
    client_id = place.index
    channels: dict[int, Channel] = {}
    with closing_links(channels), lost_if_broken("trunk rank 0 is gone or silent"):
        epoch = meeting.announce()
        channels[0], session = open_client_channel(
            meeting.link(client_id, epoch=epoch), link=config.link, client_id=client_id, agreement=agreement(config)
        )
        folder = folder_told(session, config)
        start, attempt, newcomers = meeting.take_up(folder)
        forget_adapter(folder, place.name)
        builder = ModelBuilder.of(config)
        data = load_client_data(config, client_id, load_tokenizer(builder.resolver))
        head, tail = builder.client_parts()

        def make_peers() -> PeerKeys:
            identity = load_private(config.link.keys_dir, client_name(client_id))
            pinned = Authorised.load(config.link.keys_dir).by_client_id()
            return PeerKeys(client_id, identity, pinned, meeting.run_id())

        events = EventLog(role_path(folder, place.name))
        parameters = {name: count_parameters(part) for name, part in (("head", head), ("tail", tail))}
        turns = step_hooks(config, place.name, store=meeting.store, log=events)
        client = Client(
            client_id=client_id,
            config=config,
            head=head,
            tail=tail,
            data=data,
            channel=channels[0],
            peers=make_peers() if config.train.clients_meet else None,
            make_peers=make_peers,
            needs_state=epoch > 0 or client_id in newcomers,
            has_start=client_id not in newcomers,
            log=events,
            device=device_of(config, place),
            folder=folder,
            start=start,
            attempt=attempt,
            before_step=turns.before_step,
        )
        client.open()
        stop.begin()
        begin_file(folder)
        log_begin(config, client.start)
        events.write(Started(step=client.start))

        def last_event() -> None:
            events.write(_ended(parameters, len(builder.source.keys_read), meeting.transport_name))

        # Before the goodbye, so that whoever reports after it finds everything.
        client.run(before_goodbye=last_event)
        turns.finish()
    return f"finished, results in {folder}"


def run_centralised(config: Config, yaml: str, stop: StopRequest) -> str:
    """The uncut baseline as a run of its own. Returns how it ended."""
    from hpc.baseline import build_centralised

    folder = Path(config.run.folder or made_up_folder(config))
    start, takes_up, _ = start_of(config, folder)
    forget_adapter(folder, "centralised")
    attempt = Attempt(name=secrets.token_hex(16), takes_up=takes_up)
    save_config(folder, yaml)
    begin_file(folder)
    log_begin(config, start)
    done = start
    with EventLog(role_path(folder, "centralised")) as events:
        events.write(Started(step=start))
        from hpc.report.progress import Progress

        progress = Progress(folder, total_steps=total_steps(config.train), clients_per_step=1, form=terminal_line)
        model, builder = build_centralised(config, events)
        turns = step_hooks(config, "centralised", store=None, log=events)

        def after_step(step: int) -> None:
            nonlocal done
            done = step + 1
            progress.poll()

        stop.begin()
        model.run(
            folder,
            start=start,
            attempt=attempt,
            before_step=turns.before_step,
            after_step=after_step,
            stop_asked=stop,
        )
        turns.finish()
        events.write(_ended({"model": count_parameters(model.model)}, len(builder.source.keys_read), None))
        progress.close()
    report(config, folder)
    return finished(config, done, folder)


def log_begin(config: Config, start: int) -> None:
    log.info("run begins at step %d of %d", start + 1, total_steps(config.train))


def finished(config: Config, steps: int, folder: Path) -> str:
    """How a run ended well, in words."""
    whole = total_steps(config.train)
    early = f" of {whole} (stopped early)" if steps < whole else ""
    return f"finished after {steps}{early} steps, results in {folder}"


def save_config(folder: Path, yaml: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml, encoding="utf-8")


def report(config: Config, folder: Path) -> None:
    """Merge the roles' events, write the summary and plots, print the final table."""
    from hpc.report.finish import finish
    from hpc.report.table import print_summary

    print_summary(finish(config, folder), folder=folder)


def _ended(parameters: dict[str, dict[str, int]], keys_read: int, transport: str | None) -> Ended:
    return Ended(
        peak_rss_mib=peak_rss_mib(),
        parameters=parameters,
        keys_read=keys_read,
        versions=versions(),
        transport=transport,
    )


@contextmanager
def closing_links(channels: dict[int, Channel]) -> Iterator[None]:
    """Whatever happens, the peers hear why this role ends, and no link stays open."""
    try:
        yield
    except BaseException as error:
        close_links(channels, error)
        raise
    close_links(channels, None)
