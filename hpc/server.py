"""A trunk rank: serves its clients, round by round. One round, read top to bottom.

Shape suffixes: B rows of all clients together, T longest row, D hidden size, S all valid tokens of one client.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hpc.aggregate import TrunkGroup
from hpc.agreement import agreement
from hpc.checkpoint import commit, write_role
from hpc.config import Config
from hpc.errors import NonFinite, ProtocolError
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header, Kind
from hpc.link.stats import LinkStats
from hpc.optim import LossScale, clip_factor, global_norm, learning_rate, square_sum
from hpc.ragged import pack, pad
from hpc.report.events import EventLog, TrunkStep
from hpc.schedule import Evaluate, HandOver, Save, TrainStep, instructions, total_steps
from hpc.stopwatch import Stopwatch
from hpc.trunk import Trunk

LOSS_NOT_FINITE = 1  # header flag


class Server:
    """One trunk rank and the links to its clients. All trunk ranks follow the same instructions together."""

    def __init__(
        self,
        *,
        config: Config,
        trunk: Trunk,
        channels: dict[int, Channel],
        group: TrunkGroup,
        head_learns: bool,
        hidden_size: int,
        dtype: torch.dtype,
        log: EventLog,
        folder: Path,
        start: int = 0,
    ) -> None:
        self.folder, self.start = folder, start
        self.config, self.train, self.trunk, self.channels, self.group = config, config.train, trunk, channels, group
        self.head_learns, self.log, self.device = head_learns, log, trunk.device
        self.loss_scale = LossScale.for_dtype(config.model.dtype)
        self.steps = total_steps(config.train)
        self._watch = Stopwatch()
        self._eval_batches: dict[int, int] = {}
        self._zero_BTD = torch.zeros(1, 1, hidden_size, dtype=dtype, device=self.device)

    def open(self) -> None:
        """Wait for every client, learn its number of evaluation batches, pass the clients' public keys around."""
        counts = {client: int(_tensor(ch.recv(Kind.READY))[0]) for client, ch in self.channels.items()}
        self._eval_batches = self.group.merge(counts, self.train.clients)
        for channel in self.channels.values():
            channel.send(Header(kind=Kind.READY))
        if not self.train.hands_over:
            return
        for owner in range(self.train.clients):
            mine = self.channels.get(owner)
            key = self.group.share(
                mine.recv(Kind.PEER_KEY).tensor if mine else None, owner=self.group.rank_of_client(owner)
            )
            for client, channel in self.channels.items():
                if client != owner:
                    channel.send(Header(kind=Kind.PEER_KEY), key)

    def run(self, after_step: Callable[[int], None] = lambda step: None) -> None:
        """The whole run, in the order of the schedule. `open` comes first."""
        for instruction in instructions(self.train, evaluate=self.config.data.evaluates, start=self.start):
            match instruction:
                case TrainStep():
                    self.serve_step(instruction)
                    after_step(instruction.step)
                case Evaluate():
                    self.serve_evaluation(instruction)
                case HandOver():
                    self.relay(instruction)
                case Save():
                    self.save(instruction.step)
        for channel in self.channels.values():
            channel.recv(Kind.BYE)
        self.group.barrier()
        for channel in self.channels.values():
            channel.send(Header(kind=Kind.BYE))
            channel.flush()

    def serve_step(self, order: TrainStep) -> None:
        """Forward and backward for the clients of this step as one batch, then one optimiser step."""
        mine = [client for client in order.clients if client in self.channels]
        before, watch = self._stats(), self._watch

        with watch.measure("total"):
            frames = [self._recv(client, Kind.SMASHED, order.step) for client in mine]
            lengths = [length for frame in frames for length in frame.header.lengths]
            label_tokens = self.group.sum(math.fsum(frame.header.weight for frame in frames))
            with watch.measure("trunk"):
                smashed_BTD = self._stack(frames, lengths)
                trunk_out_BTD = self.trunk.forward(smashed_BTD, input_learns=self.head_learns)
            self._send_rows(mine, frames, Kind.TRUNK_OUT, order.step, trunk_out_BTD, weight=label_tokens)

            grads = [self._recv(client, Kind.GRAD_TRUNK_OUT, order.step) for client in mine]
            with watch.measure("trunk"):
                grad_smashed_BTD = self.trunk.backward(self._stack(grads, lengths))
            if self.head_learns:
                assert grad_smashed_BTD is not None
                self._send_rows(mine, frames, Kind.GRAD_SMASHED, order.step, grad_smashed_BTD)

            norm = self._agree(order.step, mine) / self.loss_scale.value
            culprits = [c for c, frame in zip(mine, grads, strict=True) if frame.header.flags & LOSS_NOT_FINITE]
            rate, skipped = self._step(order.step, norm, culprits)

        self._log_step(order.step, rate, norm, before, skipped=skipped)

    def _agree(self, step: int, mine: Sequence[int]) -> float:
        """Tell every client the norm over all parts (and the clients' summed gradient), times the loss scale."""
        with self._watch.measure("trunk"):
            trunk_squares = self.trunk.square_sum()
        shares = [self._recv(client, Kind.PART_GRADS, step) for client in mine]
        summed = self._sum_gradients(shares)
        if summed is None:
            part_squares = self.group.sum(math.fsum(share.header.square_sum for share in shares))
        else:
            part_squares = square_sum([summed])
        norm = global_norm(part_squares, trunk_squares)
        for client in mine:
            self.channels[client].send(Header(kind=Kind.STEP, step=step, square_sum=norm), summed)
        return norm

    def _step(self, step: int, norm: float, culprits: list[int]) -> tuple[float, bool]:
        """Step the trunk, or skip with everybody; returns the learning rate and whether it was skipped."""
        finite, rate = math.isfinite(norm), learning_rate(self.train, step, self.steps)
        if not finite and not self.loss_scale.dynamic:
            for channel in self.channels.values():
                channel.flush()
            whose = f"the loss of client {culprits[0]}" if culprits else "a gradient"
            raise NonFinite(f"step {step + 1}: {whose} is not finite; nobody stepped. Lower --train.learning_rate")
        scale = self.loss_scale.value
        self.loss_scale.update(finite=finite)
        with self._watch.measure("trunk"):
            if finite:
                self.trunk.step(factor=clip_factor(norm, self.train.max_grad_norm) / scale, rate=rate)
            else:
                self.trunk.skip()
        return rate, not finite

    def serve_evaluation(self, order: Evaluate) -> None:
        """Forward only, batch by batch, the clients' batches of one turn as one."""
        self.trunk.part.eval()
        for turn in range(max(self._eval_batches.values(), default=0)):
            mine = [client for client in self.channels if turn < self._eval_batches[client]]
            frames = [self._recv(client, Kind.EVAL_SMASHED, order.step) for client in mine]
            lengths = [length for frame in frames for length in frame.header.lengths]
            trunk_out_BTD = self.trunk.infer(self._stack(frames, lengths))
            self._send_rows(mine, frames, Kind.EVAL_TRUNK_OUT, order.step, trunk_out_BTD)
        self.trunk.part.train()

    def relay(self, order: HandOver) -> None:
        """Pass on what one client sealed for another; unreadable here."""
        for receiver in order.receivers:
            sealed = None
            if order.sender in self.channels:
                frame = self._recv(order.sender, Kind.HANDOVER, order.step)
                if frame.header.micro != receiver:
                    raise ProtocolError(f"client {order.sender} hands over to {frame.header.micro}, not {receiver}")
                sealed = frame.tensor
            sealed = self.group.share(sealed, owner=self.group.rank_of_client(order.sender))
            if receiver in self.channels:
                self.channels[receiver].send(Header(kind=Kind.HANDOVER, step=order.step), sealed)

    def save(self, step: int) -> None:
        """Write the trunk's state; the checkpoint exists once every role has written its own."""
        state = self.trunk.state()
        if self.group.rank == 0:
            write_role(self.folder, step, "trunk", state, self.loss_scale.state())
        for client in self.channels:
            self._recv(client, Kind.READY, step)
        self.group.barrier()
        if self.group.rank == 0:
            commit(self.folder, step, agreement(self.config))

    def _recv(self, client: int, kind: Kind, step: int) -> Frame:
        frame = self.channels[client].recv(kind, device=self.device)
        if frame.header.step != step:
            raise ProtocolError(f"client {client} sent {kind.name} of step {frame.header.step}, not {step}")
        return frame

    def _stack(self, frames: Sequence[Frame], lengths: Sequence[int]) -> torch.Tensor:
        """The clients' packed rows as one padded batch `_BTD`; a zero-weight row if this rank has no client."""
        if not frames:
            return self._zero_BTD
        packed = [_tensor(frame) for frame in frames]
        return pad(packed[0] if len(packed) == 1 else torch.cat(packed), lengths)

    def _send_rows(
        self,
        clients: Sequence[int],
        frames: Sequence[Frame],
        kind: Kind,
        step: int,
        rows_BTD: torch.Tensor,
        weight: float = 0.0,
    ) -> None:
        first = 0
        for client, frame in zip(clients, frames, strict=True):
            lengths = frame.header.lengths
            own_BTD = rows_BTD[first : first + len(lengths), : max(lengths)]
            header = Header(kind=kind, step=step, lengths=lengths, weight=weight)
            self.channels[client].send(header, pack(own_BTD, lengths).contiguous())
            first += len(lengths)

    def _sum_gradients(self, shares: Sequence[Frame]) -> torch.Tensor | None:
        """The clients' flat gradients summed in client order, then over trunk ranks; None unless they are shared."""
        if self.train.resolved_aggregation != "gradient":
            return None
        total = torch.zeros(0)
        for share in shares:
            total = _tensor(share).clone() if not total.numel() else total.add_(_tensor(share))
        return self.group.sum_tensor(total)

    def _stats(self) -> LinkStats:
        return LinkStats.total(channel.stats for channel in self.channels.values())

    def _log_step(self, step: int, rate: float, norm: float, before: LinkStats, *, skipped: bool) -> None:
        spent, seconds = before.until(self._stats()), self._watch.take()
        seconds |= {"seal": spent.seal_s, "open": spent.open_s, "wire": spent.wire_s, "wait": spent.wait_s}
        self.log.write(
            TrunkStep(
                step=step + 1,
                seconds=seconds,
                bytes={
                    "payload": spent.payload_bytes_sent + spent.payload_bytes_received,
                    "wire": spent.wire_bytes_sent + spent.wire_bytes_received,
                },
                learning_rate=rate,
                grad_norm=norm,
                skipped=skipped,
            )
        )


def _tensor(frame: Frame) -> torch.Tensor:
    if frame.tensor is None:
        raise ProtocolError(f"{frame.header.kind.name} came without a tensor")
    return frame.tensor
