"""One training step of a trunk rank: its program (`hpc.programs.trunk_step`) carried out.

`ServedStep` is what all schedules share; in `hpc.shared_step` one set of trunk values serves all clients, in
`hpc.replica_step` each has its own. Shape suffixes: B rows of several clients together, T longest row, D hidden size, S
valid tokens of one client.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch

from hpc.acts import Backward, Combine, Forward, Lost, Micro, Recv, RecvAny, Send, Step, TrunkAct
from hpc.errors import LinkError, NonFinite, ProtocolError
from hpc.layouts import layout_tensor
from hpc.learner import seed_dropout
from hpc.link.frame import LOSS_NOT_FINITE, SPENT, Frame, Header
from hpc.link.kinds import Kind
from hpc.optim import MAX_SKIPS, Decision, decide
from hpc.ragged import pack, pad
from hpc.schedule import TrainStep
from hpc.server_side import ServerSide
from hpc.server_sum import ServedSum

_CAUSES = ("activations", "loss", "gradient")  # what of a client is not finite; the place is the code


class ServedStep(ABC):
    """Carries out one step's program; keeps what lies between its instructions."""

    def __init__(self, side: ServerSide, order: TrainStep) -> None:
        self._side, self._order = side, order
        self._mine = side.served.present(order.clients)
        self._smashed: dict[Micro, torch.Tensor] = {}  # packed
        self._headers: dict[Micro, Header] = {}  # of what was received first: row lengths, label tokens
        self._rows: dict[Micro, list[int]] = {}
        self._out: dict[Micro, torch.Tensor] = {}  # to be sent: trunk_out, then its gradient's way back; packed
        self._grads: dict[Micro, torch.Tensor] = {}
        self._shares: dict[int, Frame] = {}
        self._sum: ServedSum | None = None
        self._causes: dict[int, int] = {}
        self._scale = side.loss_scale.value
        self.cached_bytes = 0

    def carry_out(self, act: TrunkAct) -> Recv | Lost | None:
        """The next instruction of the program; what is returned is the answer to a question."""
        watch = self._side.watch
        match act:
            case Recv():
                on_device = act.kind in (Kind.SMASHED, Kind.GRAD_TRUNK_OUT)
                frame = self._side.served.recv(act, self._order.step, on_device=on_device)
                if frame is not None:
                    self._take_or_lose(act, frame)
            case RecvAny():
                answer, frame = self._side.served.recv_any(act.awaited, self._order.step, wait=act.wait)
                if isinstance(answer, Recv) and frame is not None:
                    return self._take_or_lose(answer, frame)
                return answer
            case Send():
                self._send(act)
            case Forward():
                with watch.measure("trunk"):
                    self._forward(act.batch)
            case Backward():
                with watch.measure("trunk"):
                    self._backward(act.batch)
            case Combine():
                self._combine(act.kind)
            case Step():
                with watch.measure("trunk"):
                    self._step()
        return None

    @abstractmethod
    def decisions(self) -> Mapping[int, Decision]:
        """What was decided for each client; with shared trunk values, the same for all."""

    # What comes

    def _take_or_lose(self, due: Recv, frame: Frame) -> Recv | Lost:
        """A client that sends what does not fit is lost, where the run can do without."""
        try:
            self._take(due, frame)
        except LinkError as error:
            self._side.served.lose(due.micro.client, self._order.step, error)
            return Lost(due.micro.client)
        return due

    def _take(self, due: Recv, frame: Frame) -> None:
        micro, header = due.micro, frame.header
        match due.kind:
            case Kind.ROWS:
                rows = frame.payload
                if rows.dtype != torch.int64 or rows.dim() != 1:
                    raise ProtocolError(f"client {micro.client} sent ROWS of {tuple(rows.shape)}, {rows.dtype}")
                self._rows[micro] = rows.tolist()
            case Kind.SMASHED:
                if not 1 <= header.weight <= sum(header.lengths):
                    raise ProtocolError(
                        f"client {micro.client} sent SMASHED that weighs {header.weight} label tokens; its rows have "
                        f"{sum(header.lengths)} tokens"
                    )
                self._headers[micro] = header
                self._smashed[micro] = self._completed(micro, frame)
                self._note_cause(micro.client, "activations", bool(frame.payload.isfinite().all()))
                if self._side.recorder is not None:
                    self._side.recorder.smashed(micro, header, self._smashed[micro])
            case Kind.GRAD_TRUNK_OUT:
                if header.lengths != self._headers[micro].lengths:
                    raise ProtocolError(
                        f"client {micro.client} sent GRAD_TRUNK_OUT with row lengths {header.lengths} for "
                        f"{self._headers[micro].lengths}"
                    )
                self._grads[micro] = frame.payload
                self._note_cause(micro.client, "loss", not header.flags & LOSS_NOT_FINITE)
                self._note_cause(micro.client, "gradient", bool(frame.payload.isfinite().all()))
                if self._side.recorder is not None:
                    self._side.recorder.gradient(micro, header, frame.payload)
            case Kind.PART_GRADS:
                if header.square_sum < 0:
                    raise ProtocolError(f"client {micro.client} sent a square sum of {header.square_sum}")
                self._check_gradient(micro.client, frame.tensor)
                self._shares[micro.client] = frame
                if header.flags & SPENT:
                    self._side.spent.add(micro.client)
                finite = math.isfinite(header.square_sum) and not header.flags & LOSS_NOT_FINITE
                self._note_cause(micro.client, "gradient", finite)
            case _:
                self._secure_sum().take(due.kind, micro.client, frame)

    def _check_gradient(self, client: int, vector: torch.Tensor | None) -> None:
        """Where gradients are shared, and not under masks, it must be there."""
        due = self._side.traits.shares_gradient and not self._side.traits.secure
        size = self._side.part_values
        if due and (vector is None or vector.shape != (size,) or vector.dtype != torch.float32):
            found = "nothing" if vector is None else f"{tuple(vector.shape)}, {vector.dtype}"
            raise ProtocolError(f"client {client} shares a gradient of {found}; due: {(size,)}, float32")

    def _completed(self, micro: Micro, frame: Frame) -> torch.Tensor:
        """The whole batch, with the rows that the cache has."""
        cache = self._side.caches.get(micro.client)
        if cache is None:
            return frame.payload
        rows, lengths, sent_SD = self._rows.pop(micro), frame.header.lengths, frame.payload
        if len(rows) != len(lengths):
            raise ProtocolError(f"client {micro.client} named {len(rows)} examples for {len(lengths)} rows")
        held = cache.book.enter(rows, lengths)
        due = sum(length for length, here in zip(lengths, held, strict=True) if not here)
        if sent_SD.shape[0] != due:
            who = f"client {micro.client}"
            raise ProtocolError(f"{who} sent {sent_SD.shape[0]} tokens beside what the cache has; {due} were due")
        self.cached_bytes += (sum(lengths) - due) * sent_SD.shape[1] * sent_SD.element_size()
        return cache.complete(rows, lengths, held, sent_SD)

    def _note_cause(self, client: int, what: str, finite: bool) -> None:
        if not finite:
            self._causes.setdefault(client, _CAUSES.index(what) + 1)

    # What is worked out

    def _stack(self, packed: Sequence[torch.Tensor], lengths: Sequence[int]) -> torch.Tensor:
        """Packed rows as one padded batch `_BTD`; a row of zeros if this rank has no client."""
        if not packed:
            return self._side.zero_BTD
        return pad(packed[0] if len(packed) == 1 else torch.cat(list(packed)), lengths)

    def _unstack(self, batch: Sequence[Micro], rows_BTD: torch.Tensor) -> None:
        first = 0
        for micro in batch:
            lengths = self._headers[micro].lengths
            own_BTD = rows_BTD[first : first + len(lengths), : max(lengths)]
            self._out[micro] = pack(own_BTD, lengths).contiguous()
            first += len(lengths)

    def _layout(self, batch: Sequence[Micro]) -> torch.Tensor | None:
        return layout_tensor([self._headers[micro] for micro in batch])

    def _lengths(self, batch: Sequence[Micro]) -> list[int]:
        return [length for micro in batch for length in self._headers[micro].lengths]

    def _forward(self, planned: tuple[Micro, ...]) -> None:
        """`planned` without those who are lost. What is kept for the backward pass is the trunk's business."""
        batch = tuple(micro for micro in planned if micro in self._smashed)
        # Just before what draws, so that it depends neither on who came before nor on another role of this process.
        whose = f"{planned[0].client}-{planned[0].piece}" if self._side.traits.first_come else self._side.group.rank
        seed_dropout(self._side.train.seed, self._order.step, f"trunk-{whose}")
        smashed_BTD = self._stack([self._smashed.pop(micro) for micro in batch], self._lengths(batch))
        self._forwarded = batch
        self._unstack(batch, self._run_forward(batch, smashed_BTD))

    def _backward(self, planned: tuple[Micro, ...]) -> None:
        """Rows of a client that is lost since its forward pass get a gradient of zero."""
        batch = planned if self._side.traits.first_come else self._forwarded
        size, dtype = self._side.zero_BTD.shape[-1], self._side.zero_BTD.dtype
        device = self._side.trunk.device
        packed = [
            self._grads[micro]
            if micro in self._grads
            else torch.zeros(sum(self._headers[micro].lengths), size, dtype=dtype, device=device)
            for micro in batch
        ]
        grad_smashed_BTD = self._run_backward(batch, self._stack(packed, self._lengths(batch)))
        for micro in batch:
            if micro in self._grads:
                self._grads[micro] = packed[0][:0]  # it came; its memory is no longer needed
        if self._side.traits.head_learns and batch:
            assert grad_smashed_BTD is not None
            self._unstack(batch, grad_smashed_BTD)

    def _combine(self, kind: Kind) -> None:
        if kind is Kind.SMASHED:
            self._know_weights()
        elif kind is Kind.PART_GRADS:
            self._agree()
        else:
            self._secure_sum().combine(kind)

    def _secure_sum(self) -> ServedSum:
        if self._sum is None:
            self._sum = ServedSum(self._side, clients=self._order.clients, step=self._order.step)
        return self._sum

    # What is sent

    def _send(self, act: Send) -> None:
        client = act.micro.client
        match act.kind:
            case Kind.TRUNK_OUT | Kind.GRAD_SMASHED:
                if act.micro in self._out:
                    self._send_rows(act.kind, act.micro)
            case Kind.STEP:
                self._send_step(client)
            case _:
                self._secure_sum().send(act.kind, client)

    def _send_rows(self, kind: Kind, micro: Micro) -> None:
        if kind is Kind.TRUNK_OUT and self._side.recorder is not None:
            self._side.recorder.answered(micro, self._order.step, self._out[micro])
        header = Header(
            kind=kind,
            step=self._order.step,
            micro=micro.piece,
            lengths=self._headers[micro].lengths,
            weight=self._divisor(micro.client),
            square_sum=self._scale,
        )
        self._side.served.send(micro.client, header, self._out.pop(micro))

    # What the schedules do in their own way

    @abstractmethod
    def _know_weights(self) -> None:
        """What follows from the label tokens of all clients, before the forward pass."""

    @abstractmethod
    def _divisor(self, client: int) -> float:
        """What the client divides its loss sum by."""

    @abstractmethod
    def _run_forward(self, batch: tuple[Micro, ...], smashed_BTD: torch.Tensor) -> torch.Tensor:
        """`trunk_out_BTD` of these rows."""

    @abstractmethod
    def _run_backward(self, batch: tuple[Micro, ...], grad_BTD: torch.Tensor) -> torch.Tensor | None:
        """`grad_smashed_BTD`, or None unless the client heads learn."""

    @abstractmethod
    def _agree(self) -> None:
        """Norms and decisions, with the other trunk ranks."""

    @abstractmethod
    def _send_step(self, client: int) -> None:
        """Tell a client what was decided."""

    @abstractmethod
    def _step(self) -> None:
        """Step, or leave the step out."""

    def _decide(self, scaled_norm: float, scale: float) -> Decision:
        side, step = self._side, self._order.step
        return decide(side.train, scaled_norm=scaled_norm, scale=scale, step=step, steps=side.steps)

    def _all_causes(self) -> dict[int, str]:
        """Client → what of it is not finite, known to all ranks."""
        codes = self._side.group.merge(self._causes, self._side.train.clients)
        return {client: _CAUSES[code - 1] for client, code in codes.items() if code}

    def _overflowed(self, causes: Mapping[int, str]) -> bool:
        """Whether a smaller loss scale may mend it (fp16): then the step is left out without a word."""
        scale = self._side.loss_scale
        return scale.dynamic and scale.value > 1 and all(what == "gradient" for what in causes.values())

    def _leave_out(self, causes: Mapping[int, str]) -> None:
        """This step is not finite: say so, or end the run."""
        side, step = self._side, self._order.step + 1
        if self._overflowed(causes):
            return
        words = {"activations": "the smashed activations are", "loss": "the loss is", "gradient": "the gradient is"}
        whose = "; ".join(f"client {client}: {words[what]} not finite" for client, what in causes.items())
        whose = whose or "a gradient is not finite"
        advice = "Lower --train.learning_rate"
        if side.train.on_nonfinite == "stop":
            side.served.flush()
            raise NonFinite(f"step {step}: {whose}; nobody stepped. {advice}, or use --train.on_nonfinite skip")
        for client, what in causes.items() or [(-1, "gradient")]:
            side.served.log.note("nonfinite", step=step, client_id=client, what=what)
        if side.skipped >= MAX_SKIPS:
            side.served.flush()
            raise NonFinite(f"step {step}: {whose}; {side.skipped} steps in a row were left out. {advice}")
