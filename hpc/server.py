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
from hpc.admission import Admission
from hpc.aggregate import TrunkGroup
from hpc.checkpoint import UNNAMED, Attempt
from hpc.config import MAX_ROWS, Config
from hpc.early_stopping import majority
from hpc.errors import Paused, PeerLost, ProtocolError
from hpc.export.wire import send_trunk_adapter
from hpc.layouts import layout_tensor
from hpc.link.channel import Channel
from hpc.link.frame import NOT_WRITTEN, WOULD_STOP, Frame, Header
from hpc.link.kinds import Kind
from hpc.link.stats import LinkStats
from hpc.optim import LossScale
from hpc.privacy.recording import TrunkRecorder
from hpc.programs import Traits, TrunkProgram, trunk_step, trunk_sync
from hpc.ragged import pack, pad
from hpc.reception import Reception
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
from hpc.stopping import paused_words
from hpc.stopwatch import Stopwatch
from hpc.topology import clients_of_trunk_rank
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
        admission: Admission | None = None,
        stop_asked: Callable[[], bool] = lambda: False,
        check_key: Callable[[int, bytes], None] = lambda client, message: None,
        before_pause: Callable[[], None] = lambda: None,
    ) -> None:
        """`admission`: where lost clients may come back; `stop_asked`: whether the run is to end at the next step.

        `check_key`: see `Reception`; `before_pause` is called before clients are told that the run pauses.
        """
        self.start, self.config, self.log = start, config, log
        self._stop_asked, self._before_pause = stop_asked, before_pause
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
        self.side = ServerSide(
            train=config.train,
            traits=Traits.of(config),
            trunk=trunk,
            served=self.served,
            group=group,
            loss_scale=self.loss_scale,
            steps=total_steps(config.train),
            zero_BTD=torch.zeros(1, 1, hidden_size, dtype=dtype, device=trunk.device),
            caches={},
            watch=Stopwatch(),
            recorder=TrunkRecorder.of(config, folder, group.rank, start),
        )
        self.saver = Saver(config=config, folder=folder, role=f"trunk-{group.rank}", attempt=attempt, log=log)
        # A batch has at least one row, and an example a row for each answer that is compared.
        batches = config.data.val_examples * MAX_ROWS if config.data.evaluates else 0
        self.reception = Reception(
            self.side, admission, most_batches=batches, on_return=self._empty_cache, check_key=check_key
        )
        for client in clients_of_trunk_rank(group.rank, config):
            self._empty_cache(client)
        if admission is not None:  # who has not come yet, may still
            self.served.lost.update(set(clients_of_trunk_rank(group.rank, config)) - channels.keys())

    def open(self) -> None:
        """Wait for every client, learn how much data it has, pass the clients' public keys around."""
        self.reception.open(self.start)
        self._check_enough_are_left()

    def run(
        self,
        after_step: Callable[[int], None] = lambda step: None,
        before_step: Callable[[int], None] = lambda step: None,
    ) -> None:
        """The whole run, in the order of the schedule. `open` comes first.

        Raises `Paused`, with a checkpoint written, if it is asked to stop.
        """
        boundary = -1
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=self.start):
            if instruction.step > boundary and not isinstance(instruction, (Sync, Save)):
                boundary = instruction.step  # what the step begins with: nobody has done anything of it
                self._pause_if_asked(boundary)
                self.reception.admit(boundary)
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
        batches = self.reception.eval_batches
        for turn in range(max((batches.get(client, 0) for client in self.reception.here()), default=0)):
            mine = [c for c in self.served.present(self.channels) if turn < batches.get(c, 0)]
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

    def _pause_if_asked(self, step: int) -> None:
        """End the run here, to be resumed: all ranks, if any of them was asked to, or a client may send no more."""
        # Where the run can do without a client, none may end it for the others.
        spent = sorted(self.side.spent) if not self.train.min_clients else []
        if not self.group.sum(self._stop_asked() or bool(spent)):
            return
        self._before_pause()
        for client in self.served.present(self.channels):
            self.served.send(client, Header(kind=Kind.PAUSE, step=step))
        # Where this attempt begins there is a checkpoint already, which must not be put at risk.
        done = step > 0 and (step == self.start or self.save(step, dropping=True))
        self.served.flush()
        why = f"the privacy budget of clients {spent} is used up; " if spent else ""
        raise Paused(why + paused_words(step, checkpoint=done))

    def save(self, step: int, *, dropping: bool = False) -> bool:
        """Write the trunk's state; the checkpoint exists once every role has written its own. Whether it does.

        If a role cannot write, or a client is lost whose parts nobody else has, there is no checkpoint at this step,
        and the run goes on. `dropping`: what clients have sent for the step that is not to be is dropped.
        """
        written = self._write(step)
        mine = self.served.present(self.channels)
        heard = {c: self._hear_of_save(c, step, dropping=dropping) for c in mine}
        flags = {c: frame.header.flags & NOT_WRITTEN for c, frame in heard.items() if frame is not None}
        lost = self.group.merge(dict.fromkeys(self.served.lost, 1), self.train.clients)
        why = obstacle(
            lost=sum(lost.values()),
            spared=self._spared_at(step, sum(lost.values())),
            unwritten=self.group.merge(flags, self.train.clients),
            ranks=int(self.group.sum(not written and self.group.rank > 0)),
        )
        kept = None
        if self.group.rank == 0:
            if why is not None:
                self.saver.fail(step, why)
            clients = [client for client, gone in lost.items() if not gone]
            kept = to_payload(self.saver.commit(step, clients) if written and why is None else []).view(torch.uint8)
        kept = self.group.share(kept, owner=0).view(torch.int64)
        self.saver.finish(step, from_payload(kept))
        for client in self.served.present(self.channels):
            self.served.send(client, Header(kind=Kind.READY, step=step), kept)
        return bool(from_payload(kept))

    def _spared_at(self, step: int, lost: int) -> bool:
        """Whether a checkpoint may do without lost clients: others have what they had, and would give it."""
        between_averages = self.train.averages and step % self.train.sync_every != 0
        left = self.train.clients - lost
        return self.train.shares_state and not between_averages and left >= max(1, self.train.min_clients)

    def _hear_of_save(self, client: int, step: int, *, dropping: bool) -> Frame | None:
        if dropping:
            return self.served.skip_to(client, Kind.READY, step)
        return self.served.recv(Recv(Kind.READY, Micro(client)), step, on_device=False)

    def _empty_cache(self, client: int) -> None:
        """Both ends begin with nothing: the other end's book is as old as the client's process."""
        if self.config.caches_smashed:
            share = self.config.trunk.smashed_cache_bytes // self.train.clients
            token_bytes = self.side.zero_BTD.shape[-1] * self.side.zero_BTD.element_size()
            self.side.caches[client] = SmashedCache(limit_bytes=share, token_bytes=token_bytes)

    def _write(self, step: int) -> bool:
        """Whether what this rank has to write is written."""
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
