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
from hpc.learner import seed_dropout
from hpc.link.channel import Channel
from hpc.link.frame import LOSS_NOT_FINITE, Frame, Header, Kind
from hpc.link.stats import LinkStats
from hpc.optim import Decision, LossScale, decide, global_norm, square_sum
from hpc.ragged import pack, pad
from hpc.report.events import EventLog, TrunkStep
from hpc.schedule import Evaluate, HandOver, Save, TrainStep, instructions, total_steps
from hpc.stopwatch import Stopwatch
from hpc.trunk import Trunk

HIDDEN_STATES = (Kind.SMASHED, Kind.GRAD_TRUNK_OUT, Kind.EVAL_SMASHED)


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
        counts = {client: int(ch.recv(Kind.READY).payload[0]) for client, ch in self.channels.items()}
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
        self._keep_waiting(mine)
        before, watch, scale = self._stats(), self._watch, self.loss_scale.value

        with watch.measure("total"):
            frames = [self._recv(client, Kind.SMASHED, order.step) for client in mine]
            lengths = [length for frame in frames for length in frame.header.lengths]
            label_tokens = self.group.sum(math.fsum(frame.header.weight for frame in frames))
            with watch.measure("trunk"):
                seed_dropout(self.train.seed, order.step, f"trunk-{self.group.rank}")
                smashed_BTD = self._stack(frames, lengths)
                trunk_out_BTD = self.trunk.forward(smashed_BTD, input_learns=self.head_learns)
            self._send_rows(mine, frames, Kind.TRUNK_OUT, order.step, trunk_out_BTD, label_tokens, scale)

            grads = [self._recv(client, Kind.GRAD_TRUNK_OUT, order.step) for client in mine]
            with watch.measure("trunk"):
                grad_smashed_BTD = self.trunk.backward(self._stack(grads, lengths))
            if self.head_learns:
                assert grad_smashed_BTD is not None
                self._send_rows(mine, frames, Kind.GRAD_SMASHED, order.step, grad_smashed_BTD)

            scaled_norm = self._agree(order.step, mine)
            culprits = self.group.merge(
                {c: f.header.flags & LOSS_NOT_FINITE for c, f in zip(mine, grads, strict=True)}, self.train.clients
            )
            decision = self._step(order.step, scaled_norm, [c for c, not_finite in culprits.items() if not_finite])

        self._log_step(order.step, decision, before)

    def _agree(self, step: int, mine: Sequence[int]) -> float:
        """Tell every client the norm over all parts (and the clients' summed gradient), times the loss scale."""
        with self._watch.measure("trunk"):
            trunk_squares = self.trunk.square_sum()
        shares = [self._recv(client, Kind.PART_GRADS, step, on_device=False) for client in mine]
        summed = self._sum_gradients(shares)
        if summed is None:
            part_squares = self.group.sum(math.fsum(share.header.square_sum for share in shares))
        else:
            part_squares = square_sum([summed])
        norm = global_norm(part_squares, trunk_squares)
        for client in mine:
            self.channels[client].send(Header(kind=Kind.STEP, step=step, square_sum=norm), summed)
        return norm

    def _step(self, step: int, scaled_norm: float, culprits: list[int]) -> Decision:
        """Step the trunk, or skip with everybody."""
        scale = self.loss_scale.value
        decision = decide(self.train, scaled_norm=scaled_norm, scale=scale, step=step, steps=self.steps)
        if not decision.finite and not self.loss_scale.dynamic:
            for channel in self.channels.values():
                channel.flush()
            whose = f"the loss of client {culprits[0]}" if culprits else "a gradient"
            raise NonFinite(f"step {step + 1}: {whose} is not finite; nobody stepped. Lower --train.learning_rate")
        self.loss_scale.update(finite=decision.finite)
        with self._watch.measure("trunk"):
            if decision.finite:
                self.trunk.step(factor=decision.factor, rate=decision.rate)
            else:
                self.trunk.skip()
        return decision

    def serve_evaluation(self, order: Evaluate) -> None:
        """Forward only, batch by batch, the clients' batches of one turn as one."""
        self.trunk.part.eval()
        for turn in range(max(self._eval_batches.values(), default=0)):
            mine = [client for client in self.channels if turn < self._eval_batches[client]]
            self._keep_waiting(mine)
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
                frame = self._recv(order.sender, Kind.HANDOVER, order.step, on_device=False)
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

    def _keep_waiting(self, busy: Sequence[int]) -> None:
        """Clients that wait for others' work hear that it goes on, so that a deadline means silence, not patience."""
        for client, channel in self.channels.items():
            if client not in busy:
                channel.send(Header(kind=Kind.ALIVE))

    def _recv(self, client: int, kind: Kind, step: int, *, on_device: bool = True) -> Frame:
        """A client's next frame; hidden states must have the shape and dtype that the handshake agreed on."""
        frame = self.channels[client].recv(kind, device=self.device if on_device else None)
        header = frame.header
        if header.step != step:
            raise ProtocolError(f"client {client} sent {kind.name} of step {header.step}, not {step}")
        wanted = (sum(header.lengths), self._zero_BTD.shape[-1])
        if kind in HIDDEN_STATES and (header.shape != wanted or header.dtype != self._zero_BTD.dtype):
            raise ProtocolError(
                f"client {client} sent {kind.name} of {header.shape}, {header.dtype}; "
                f"due: {wanted}, {self._zero_BTD.dtype}"
            )
        if kind in HIDDEN_STATES and (not header.lengths or min(header.lengths) < 1):
            raise ProtocolError(f"client {client} sent {kind.name} with row lengths {header.lengths}")
        return frame

    def _stack(self, frames: Sequence[Frame], lengths: Sequence[int]) -> torch.Tensor:
        """The clients' packed rows as one padded batch `_BTD`; a zero-weight row if this rank has no client."""
        if not frames:
            return self._zero_BTD
        packed = [frame.payload for frame in frames]
        return pad(packed[0] if len(packed) == 1 else torch.cat(packed), lengths)

    def _send_rows(
        self,
        clients: Sequence[int],
        frames: Sequence[Frame],
        kind: Kind,
        step: int,
        rows_BTD: torch.Tensor,
        weight: float = 0.0,
        scale: float = 1.0,
    ) -> None:
        first = 0
        for client, frame in zip(clients, frames, strict=True):
            lengths = frame.header.lengths
            own_BTD = rows_BTD[first : first + len(lengths), : max(lengths)]
            header = Header(kind=kind, step=step, lengths=lengths, weight=weight, square_sum=scale)
            self.channels[client].send(header, pack(own_BTD, lengths).contiguous())
            first += len(lengths)

    def _sum_gradients(self, shares: Sequence[Frame]) -> torch.Tensor | None:
        """The clients' flat gradients summed in client order, then over trunk ranks; None unless they are shared."""
        if self.train.resolved_aggregation != "gradient":
            return None
        first, *others = [share.payload for share in shares]
        for client_share in others:
            if client_share.shape != first.shape:
                raise ProtocolError(f"clients share gradients of {tuple(first.shape)} and {tuple(client_share.shape)}")
            first += client_share
        return self.group.sum_tensor(first)

    def _stats(self) -> LinkStats:
        return LinkStats.total(channel.stats for channel in self.channels.values())

    def _log_step(self, step: int, decision: Decision, before: LinkStats) -> None:
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
                learning_rate=decision.rate,
                grad_norm=decision.norm,
                skipped=not decision.finite,
            )
        )
