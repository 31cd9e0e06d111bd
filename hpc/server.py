"""A trunk rank: serves its clients in the order of the schedule.

One training step is in `hpc.server_step`, an average in `hpc.server_sum`. Shape suffixes: B rows of several clients
together, T longest row, D hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hpc.acts import Micro, Recv
from hpc.aggregate import TrunkGroup
from hpc.checkpoint import UNNAMED, Attempt
from hpc.config import Config
from hpc.early_stopping import majority
from hpc.errors import PeerLost, ProtocolError
from hpc.export.wire import send_trunk_adapter
from hpc.layouts import layout_tensor
from hpc.link.channel import Channel
from hpc.link.frame import NOT_WRITTEN, WOULD_STOP, Frame, Header
from hpc.link.kinds import Kind
from hpc.link.stats import LinkStats
from hpc.optim import LossScale
from hpc.programs import Traits, TrunkProgram, trunk_step, trunk_sync
from hpc.ragged import pack, pad
from hpc.replica_step import ReplicaStep
from hpc.replica_trunk import ReplicaTrunk
from hpc.report.events import EventLog, TrunkStep
from hpc.saving import Saver, from_payload, obstacle, to_payload
from hpc.schedule import Evaluate, HandOver, Save, Sync, TrainStep, instructions, total_steps
from hpc.served import Served
from hpc.served_decoding import ServedDecoding
from hpc.server_side import ServerSide
from hpc.server_step import ServedStep
from hpc.server_sum import SyncRun
from hpc.shared_step import SharedStep
from hpc.smashed_cache import SmashedCache
from hpc.stopwatch import Stopwatch
from hpc.trunk import Trunk

log = logging.getLogger("hpc")


class Server:
    """One trunk rank and the links to its clients. All trunk ranks follow the same instructions together."""

    def __init__(
        self,
        *,
        config: Config,
        trunk: Trunk | ReplicaTrunk,
        channels: dict[int, Channel],
        group: TrunkGroup,
        hidden_size: int,
        dtype: torch.dtype,
        log: EventLog,
        folder: Path,
        start: int = 0,
        attempt: Attempt = UNNAMED,
    ) -> None:
        self.start, self.config, self.log = start, config, log
        self.train, self.channels, self.group = config.train, channels, group
        self.loss_scale = LossScale.for_dtype(config.model.dtype)
        self.served = Served(
            config=config,
            channels=channels,
            device=trunk.device,
            hidden_size=hidden_size,
            dtype=dtype,
            log=log,
            described=trunk.part.needs_layout,
        )
        share = config.trunk.smashed_cache_bytes // config.train.clients
        self.side = ServerSide(
            train=config.train,
            traits=Traits.of(config),
            trunk=trunk,
            served=self.served,
            group=group,
            loss_scale=self.loss_scale,
            steps=total_steps(config.train),
            zero_BTD=torch.zeros(1, 1, hidden_size, dtype=dtype, device=trunk.device),
            caches={
                client: SmashedCache(limit_bytes=share, token_bytes=hidden_size * dtype.itemsize)
                for client in channels
                if config.caches_smashed
            },
            watch=Stopwatch(),
        )
        self.saver = Saver(config=config, folder=folder, role=f"trunk-{group.rank}", attempt=attempt, log=log)
        self._eval_batches: dict[int, int] = {}

    def open(self) -> None:
        """Wait for every client, learn how much data it has, pass the clients' public keys around."""
        told = {client: self._ready(client) for client in self.channels}
        self._eval_batches, samples, sizes = (
            self.group.merge({client: row[place] for client, row in told.items()}, self.train.clients)
            for place in range(3)
        )
        self.side.samples = [samples[client] for client in range(self.train.clients)]
        if len(set(sizes.values())) > 1:
            raise ProtocolError(f"the clients' parts have different numbers of values that learn: {sizes}")
        self.side.part_values = sizes[0]
        for channel in self.channels.values():
            channel.send(Header(kind=Kind.READY), torch.tensor(self.side.samples))
        if self.train.clients_meet:
            self._pass_keys_around()

    def _ready(self, client: int) -> list[int]:
        told = self.served.inbox.recv(client, Kind.READY).payload
        if told.shape != (3,) or told.dtype != torch.int64 or bool((told < 0).any()):
            raise ProtocolError(f"client {client} sent READY of {tuple(told.shape)}, {told.dtype}; due: three numbers")
        return [int(number) for number in told]

    def _pass_keys_around(self) -> None:
        for owner in range(self.train.clients):
            mine = self.served.inbox.recv(owner, Kind.PEER_KEY).tensor if owner in self.channels else None
            key = self.group.share(mine, owner=self.group.rank_of_client(owner))
            for client, channel in self.channels.items():
                if client != owner:
                    channel.send(Header(kind=Kind.PEER_KEY), key)

    def run(
        self,
        after_step: Callable[[int], None] = lambda step: None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """The whole run, in the order of the schedule. `open` comes first."""
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=self.start):
            match instruction:
                case TrainStep():
                    before_step(instruction.step)
                    self.serve_step(instruction)
                    after_step(instruction.step)
                case Sync():
                    self.average(instruction)
                case Evaluate():
                    self.serve_evaluation(instruction)
                    if self._majority_would_stop(instruction.step):
                        break
                case HandOver():
                    self.relay(instruction)
                case Save():
                    self.save(instruction.step)
        if self.config.run.save_adapter:
            send_trunk_adapter(self.side.trunk, self.served)
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """The work is done: whoever is gone by now harms nobody."""
        for client in self.served.present(self.channels):
            self.served.recv(Recv(Kind.BYE, Micro(client)), 0, on_device=False)
        self.group.barrier()
        for client in self.served.present(self.channels):
            self.served.send(client, Header(kind=Kind.BYE))
        self.served.flush()

    def serve_step(self, order: TrainStep) -> None:
        """Forward and backward for the clients of this step, then one optimiser step."""
        mine = self.served.present(self.channels)
        self.served.keep_waiting([client for client in order.clients if client in mine])
        before, watch, scale = self.served.stats(), self.side.watch, self.loss_scale.value
        watch.take()
        with watch.measure("total"):
            run = (ReplicaStep if self.train.schedule == "replica" else SharedStep)(self.side, order)
            _carry_out(trunk_step(order, self.side.traits, mine), run)
            self._check_enough_are_left()
        self._log_step(order, run, before, scale)

    def average(self, order: Sync) -> None:
        """FedAvg: of the client parts, and of the trunk's replicas."""
        mine = self.served.present(self.channels)
        self.served.keep_waiting(order.clients)
        run = SyncRun(self.side, order)
        for act in trunk_sync(order, self.side.traits, mine):
            run.carry_out(act)

    def serve_evaluation(self, order: Evaluate) -> None:
        """Forward only, batch by batch, the clients' batches of one turn as one."""
        self.side.trunk.part.eval()
        for turn in range(max(self._eval_batches.values(), default=0)):
            mine = [c for c in self.served.present(self.channels) if turn < self._eval_batches[c]]
            self.served.keep_waiting(mine)
            found = {c: self.served.recv(Recv(Kind.EVAL_SMASHED, Micro(c)), order.step) for c in mine}
            frames = {client: frame for client, frame in found.items() if frame is not None}
            lengths = [length for frame in frames.values() for length in frame.header.lengths]
            packed = [frame.payload for frame in frames.values()]
            smashed_BTD = pad(torch.cat(packed), lengths) if packed else self.side.zero_BTD
            groups = tuple((client, len(frame.header.lengths)) for client, frame in frames.items())
            layout_B2 = layout_tensor(frame.header for frame in frames.values())
            trunk_out_BTD = self._infer(smashed_BTD, groups, layout_B2)
            self._send_evaluated(frames, order.step, trunk_out_BTD)
        if self.config.data.decodes:
            decoding = ServedDecoding(
                self.served,
                self.side.trunk,
                context=self.config.data.longest_row,
                limit_bytes=self.config.trunk.generation_bytes,
            )
            decoding.serve(self.served.present(self.channels))
        self.side.trunk.part.train()
        log.info("evaluation after step %d: served %d clients", order.step, len(self.served.present(self.channels)))

    def _infer(
        self, smashed_BTD: torch.Tensor, groups: Sequence[tuple[int, int]], layout_B2: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(self.side.trunk, Trunk):
            return self.side.trunk.infer(smashed_BTD, layout_B2)
        groups = groups or self.side.trunk.idle_groups()
        return self.side.trunk.infer(smashed_BTD, groups, layout_B2) if groups else smashed_BTD

    def _send_evaluated(self, frames: dict[int, Frame], step: int, rows_BTD: torch.Tensor) -> None:
        first = 0
        for client, frame in frames.items():
            lengths = frame.header.lengths
            own_BTD = rows_BTD[first : first + len(lengths), : max(lengths)]
            header = Header(kind=Kind.EVAL_TRUNK_OUT, step=step, lengths=lengths)
            self.served.send(client, header, pack(own_BTD, lengths).contiguous())
            first += len(lengths)

    def _majority_would_stop(self, step: int) -> bool:
        """Collect the clients' votes, and tell the verdict."""
        if not self.train.early_stopping_patience:
            return False
        mine = self.served.present(self.channels)
        found = {c: self.served.recv(Recv(Kind.VOTE, Micro(c)), step) for c in mine}
        votes = {c: frame.header.flags & WOULD_STOP for c, frame in found.items() if frame is not None}
        stop = majority(int(self.group.sum(sum(votes.values()))), int(self.group.sum(len(votes))))
        for client in votes:
            self.served.send(client, Header(kind=Kind.VERDICT, step=step, flags=WOULD_STOP if stop else 0))
        if stop and self.group.rank == 0:
            self.log.note("early_stop", step=step)
        return stop

    def relay(self, order: HandOver) -> None:
        """Pass on what one client sealed for another; unreadable here."""
        for receiver in order.receivers:
            sealed = None
            if order.sender in self.channels:
                frame = self.served.recv(Recv(Kind.HANDOVER, Micro(order.sender)), order.step, on_device=False)
                assert frame is not None, "a schedule that hands over spares no client"
                if frame.header.micro != receiver:
                    raise ProtocolError(f"client {order.sender} hands over to {frame.header.micro}, not {receiver}")
                sealed = frame.tensor
            sealed = self.group.share(sealed, owner=self.group.rank_of_client(order.sender))
            if receiver in self.channels:
                self.served.send(receiver, Header(kind=Kind.HANDOVER, step=order.step), sealed)

    def save(self, step: int) -> None:
        """Write the trunk's state; the checkpoint exists once every role has written its own.

        If a client is lost, or a role cannot write, there is no checkpoint at this step, and the run goes on.
        """
        written = self._write(step)
        mine = self.served.present(self.channels)
        heard = {c: self.served.recv(Recv(Kind.READY, Micro(c)), step, on_device=False) for c in mine}
        flags = {c: frame.header.flags & NOT_WRITTEN for c, frame in heard.items() if frame is not None}
        why = obstacle(
            lost=int(self.group.sum(len(self.served.lost))),
            unwritten=self.group.merge(flags, self.train.clients),
            ranks=int(self.group.sum(not written and self.group.rank > 0)),
        )
        kept = None
        if self.group.rank == 0:
            if why is not None:
                self.saver.fail(step, why)
            kept = to_payload(self.saver.commit(step) if written and why is None else []).view(torch.uint8)
        kept = self.group.share(kept, owner=0).view(torch.int64)
        self.saver.finish(step, from_payload(kept))
        for client in self.served.present(self.channels):
            self.served.send(client, Header(kind=Kind.READY, step=step), kept)

    def _write(self, step: int) -> bool:
        """Whether what this rank has to write is written. Collective."""
        if self.group.sum(len(self.served.lost)):
            return True
        state, replicas = self.side.trunk.state(), self.train.schedule == "replica"
        if self.group.rank > 0 and not replicas:
            return True
        name = f"trunk-{self.group.rank}" if replicas else "trunk"
        return self.saver.write(step, name, state, self.loss_scale.state())

    def _check_enough_are_left(self) -> None:
        if self.train.min_clients == 0:
            return
        left, least = self.train.clients - int(self.group.sum(len(self.served.lost))), self.train.min_clients
        if left < least:
            raise PeerLost(f"{left} of {self.train.clients} clients are left; --train.min_clients is {least}")

    def _log_step(self, order: TrainStep, run: ServedStep, before: LinkStats, scale: float) -> None:
        spent, seconds = before.until(self.served.stats()), self.side.watch.take()
        seconds |= {"seal": spent.seal_s, "open": spent.open_s, "wire": spent.wire_s, "wait": spent.wait_s}
        found = list(run.decisions().values())
        sent = {
            "payload": spent.payload_bytes_sent + spent.payload_bytes_received,
            "wire": spent.wire_bytes_sent + spent.wire_bytes_received,
        }
        if self.side.caches:
            sent["cached"] = run.cached_bytes
        self.log.write(
            TrunkStep(
                step=order.step + 1,
                seconds={"trunk": 0.0, **seconds},
                bytes=sent,
                learning_rate=found[0].rate if found else 0.0,
                grad_norm=max((decision.norm for decision in found), default=0.0),
                skipped=any(not decision.finite for decision in found),
            )
        )


def _carry_out(program: TrunkProgram, run: ServedStep) -> None:
    """Let the program ask, and tell it what came."""
    answer = None
    while True:
        try:
            act = program.send(answer)
        except StopIteration:
            return
        answer = run.carry_out(act)
