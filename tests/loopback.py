"""A whole federation in threads of this process: real frames, real cipher, real DeepSpeed, no processes."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.admission import Admission
from hpc.aggregate import TrunkGroup
from hpc.build_trunk import build_trunk
from hpc.centralised import Centralised
from hpc.checkpoint import UNNAMED, Attempt
from hpc.client import Client
from hpc.config import Config, LinkConfig
from hpc.data.dataset import load_client_data
from hpc.errors import Paused
from hpc.link.channel import Channel
from hpc.link.loopback import loopback_channels
from hpc.link.peers import PeerKeys
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.replica_trunk import ReplicaTrunk
from hpc.report.events import EventLog, read_events, role_path
from hpc.server import Server
from hpc.trunk import Trunk

KEYS = (bytes(range(32)), bytes(range(32, 64)))


@dataclass
class Outcome:
    """What a run left: losses a step (mean over the step's label tokens), accuracy, and trained tensors by name."""

    losses: list[float]
    correct: dict[int, int]
    trained: dict[str, torch.Tensor]
    clients: list[Client] = field(default_factory=list)


def one_rank_group() -> None:
    """DeepSpeed needs a default group, even of one."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def channel_pair(
    encryption: str, wrap: Callable[[Any], Any] = lambda transport: transport, timeout_s: float = 60
) -> tuple[Channel, Channel]:
    """Client's end and server's end. `wrap` may put a tap around each end's transport."""
    link = LinkConfig(encryption=encryption, chunk_mib=1 / 16, timeout_s=timeout_s)  # type: ignore[arg-type]
    return loopback_channels(link, KEYS, wrap=wrap)


def run_split(
    config: Config,
    folder: Path,
    *,
    wrap: Callable[[Any], Any] = lambda t: t,
    peers: Any = None,
    start: int = 0,
    prepare: Callable[[Client], None] = lambda client: None,
    dying: frozenset[int] = frozenset(),
    timeout_s: float = 60,
    attempt: Attempt = UNNAMED,
    newcomers: frozenset[int] = frozenset(),
    returning: int = 0,
    make_peers: Callable[[int], PeerKeys] | None = None,
    stop_asked: Callable[[], bool] = lambda: False,
    waits_for_return: int = -1,
) -> Outcome:
    """Train as `config` says, every role a thread; raises what the first failing role raised.

    `prepare` is called with each client before it opens; clients in `dying` may fail, and start again, so many times in
    all as `returning` says: the trunk takes in the first at boundary `waits_for_return`. `newcomers` have nothing in
    the checkpoint that the others resume from.
    """
    one_rank_group()
    epochs = dict.fromkeys(range(config.train.clients), 1)  # how often each has started
    pairs = [channel_pair(config.link.encryption, wrap, timeout_s) for _ in range(config.train.clients)]
    again: dict[tuple[int, int], tuple[Channel, Channel]] = {}
    failures: list[BaseException] = []
    clients: dict[int, Client] = {}

    def client(client_id: int, channel: Channel, *, needs_state: bool) -> None:
        builder = ModelBuilder.of(config)
        head, tail = builder.client_parts()
        clients[client_id] = Client(
            client_id=client_id,
            config=config,
            head=head,
            tail=tail,
            data=load_client_data(config, client_id, load_tokenizer(builder.resolver)),
            channel=channel,
            peers=(peers or {}).get(client_id) if config.train.clients_meet else None,
            make_peers=None if make_peers is None else lambda: make_peers(client_id),
            needs_state=needs_state,
            has_start=client_id not in newcomers,
            attempt=attempt,
            log=EventLog(role_path(folder, f"client-{client_id}")),
            device=torch.device("cpu"),
            folder=folder,
            start=start,
        )
        prepare(clients[client_id])
        clients[client_id].open()
        clients[client_id].run()

    def guarded(work: Callable[[], None], channels: list[Channel], may_fail: bool = False) -> None:
        try:
            work()
        except BaseException as error:
            failures.extend([] if may_fail else [error])
            for channel in channels:
                channel.send_error(str(error))
                channel.close()

    builder = ModelBuilder.of(config)
    device = torch.device("cpu")
    trunk, _ = build_trunk(
        builder.part("trunk"), config, rank=0, device=device, folder=folder, start=start, attempt=attempt
    )
    servers: list[Server] = []
    admission = None
    if returning:
        admission = Admission(
            range(config.train.clients),
            starts=lambda k: epochs[k],
            connect=lambda k, epoch: again[k, epoch][1] if epoch else pairs[k][1],
            is_here=lambda k: bool(servers) and servers[0].served.is_here(k),
            refused=lambda k, why: failures.append(AssertionError(f"client {k} was refused: {why}")),
            timeout_s=timeout_s,
            start_patience_s=timeout_s,
            clients_meet=config.train.clients_meet,
        )
    channels = dict(enumerate(pair[1] for pair in pairs)) if admission is None else admission.first(least=1)
    server = Server(
        config=config,
        trunk=trunk,
        channels=channels,
        group=TrunkGroup(0, 1, 60),
        hidden_size=builder.hidden_size,
        dtype=builder.dtype,
        log=EventLog(role_path(folder, "trunk-0")),
        folder=folder,
        start=start,
        attempt=attempt,
        admission=admission,
        stop_asked=stop_asked,
    )
    servers.append(server)
    if admission is not None and waits_for_return >= 0:
        take_in, boundary = server.reception.admit, itertools.count()

        def admit(step: int) -> None:
            number, deadline = next(boundary), time.monotonic() + timeout_s
            while number == waits_for_return and not admission.arrived() and time.monotonic() < deadline:
                time.sleep(0.02)
            if number >= waits_for_return:
                take_in(step)

        server.reception.admit = admit  # type: ignore[method-assign]

    def live(k: int) -> None:
        """All that client k does, its returns included."""
        channel, needs_state = pairs[k][0], k in newcomers
        while True:
            guarded(partial(client, k, channel, needs_state=needs_state), [channel], k in dying)
            if k not in dying or epochs[k] > returning:
                return
            again[k, epochs[k]] = channel_pair(config.link.encryption, wrap, timeout_s)
            channel, needs_state = again[k, epochs[k]][0], True
            epochs[k] += 1

    threads = [threading.Thread(target=live, args=(k,), daemon=True) for k in range(config.train.clients)]
    for thread in threads:
        thread.start()

    def serve() -> None:
        server.open()
        server.run()

    guarded(serve, [pair[1] for pair in pairs])
    if admission is not None:
        admission.close()
    for client_id, thread in enumerate(threads):
        if client_id not in dying or returning:
            thread.join(60)
            assert not thread.is_alive(), "a client hangs"
    if failures and all(isinstance(failure, Paused) for failure in failures):
        assert len(failures) == 1 + config.train.clients - len(dying), "everybody pauses"
        raise failures[0]
    if failures:  # as the launcher does: the trunk's own words before a client's echo of them
        raise next((failure for failure in failures if "the trunk names whose" not in str(failure)), failures[0])
    trained = trunk_values(trunk)
    trained |= {name: p.detach().clone() for name, p in clients[0].learner.parameters.items()}
    return Outcome(losses_of(folder), correct_of(folder), trained, [clients[k] for k in sorted(clients)])


def trunk_values(trunk: Trunk | ReplicaTrunk) -> dict[str, torch.Tensor]:
    """What learns in the trunk by name; with replicas, `replica-<client>/<name>`."""
    if isinstance(trunk, Trunk):
        return {name: p.detach().clone() for name, p in trunk.part.trainable().items()}
    state = trunk.state()
    return {name.replace("/parameter/", "/"): value for name, value in state.items() if "/parameter/" in name}


def run_centralised(config: Config, folder: Path, start: int = 0) -> Outcome:
    """The project's own baseline."""
    builder = ModelBuilder.of(config)
    tokenizer = load_tokenizer(builder.resolver)
    data = [load_client_data(config, k, tokenizer) for k in range(config.train.clients)]
    log = EventLog(role_path(folder, "centralised"))
    model = Centralised(
        config=config, cut=builder.cut, model=builder.part("whole"), data=data, log=log, device=torch.device("cpu")
    )
    model.run(folder, start=start)
    trained = {name: p.detach().clone() for name, p in model.learner.parameters.items()}
    return Outcome(losses_of(folder), correct_of(folder), trained)


def losses_of(folder: Path) -> list[float]:
    sums: dict[int, list[tuple[float, int]]] = {}
    for path in sorted((folder / "roles").glob("c*/metrics.jsonl")):
        for event in read_events(path):
            if event["event"] == "step":
                sums.setdefault(event["step"], []).append((event["loss_sum"], event["label_tokens"]))
    return [sum(s for s, _ in parts) / sum(n for _, n in parts) for _, parts in sorted(sums.items())]


def correct_of(folder: Path) -> dict[int, int]:
    """Step → right answers over all clients."""
    found: dict[int, int] = {}
    for path in sorted((folder / "roles").glob("c*/metrics.jsonl")):
        for event in read_events(path):
            if event["event"] == "eval" and event["correct"] is not None:
                found[event["step"]] = found.get(event["step"], 0) + event["correct"]
    return found
