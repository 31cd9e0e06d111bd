"""One training step of a client: its program (`hpc.programs.client_step`) carried out, read top to bottom.

Shape suffixes: B rows, T tokens, D hidden size, L label positions (over all rows).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch

from hpc.acts import ClientAct, HeadBackward, HeadForward, Micro, Recv, Send, Step, TailStep
from hpc.client_side import ClientSide
from hpc.contribution import MaskedContribution
from hpc.data.collate import Batch, in_pieces
from hpc.errors import NonFinite
from hpc.layouts import layout_numbers
from hpc.learner import seed_dropout, tail_loss_sum
from hpc.link.frame import LEFT_OUT, LOSS_NOT_FINITE, SPENT, Header
from hpc.link.kinds import Kind
from hpc.link.masks import fits_fixed
from hpc.optim import decide
from hpc.ragged import pad, split_rows
from hpc.schedule import TrainStep


class ClientStepRun:
    """Carries out one step's program; keeps what lies between its instructions."""

    def __init__(
        self,
        side: ClientSide,
        order: TrainStep,
        batch: Batch | None,
        rows: Sequence[int],
        *,
        is_spent: Callable[[], bool] = lambda: False,
    ) -> None:
        """`batch`: None for a client that is not in this step; `rows`: the batch's examples, by number; `is_spent`:
        whether, behind this step, the privacy budget does not allow what comes next.
        """
        self._side, self._order, self._is_spent = side, order, is_spent
        train = side.train
        self._loss_sum = 0.0
        if batch is not None:
            sizes = split_rows(len(batch.lengths), train.resolved_micro_batches)
            self._pieces = in_pieces(batch, sizes)
            starts = [sum(sizes[:index]) for index in range(len(sizes))]
            self._rows = [list(rows[first : first + size]) for first, size in zip(starts, sizes, strict=True)]
        self._smashed: dict[int, torch.Tensor] = {}
        self._hidden_faults: set[int] = set()  # pieces of which the shield hides values that are not finite
        self._layouts: dict[int, torch.Tensor | None] = {}  # see `Part.layout_of`
        self._to_send: dict[int, list[int]] = {}  # rows of a piece that the server's cache lacks
        self._grads: dict[int, tuple[torch.Tensor, bool, float]] = {}
        self._trunk_out: dict[int, tuple[torch.Tensor, float, float]] = {}
        self._grad_smashed: dict[int, torch.Tensor] = {}
        self._masked: MaskedContribution | None = None

    @property
    def loss_sum(self) -> float:
        """Over the label tokens of the batch (nats)."""
        return self._loss_sum

    def carry_out(self, act: ClientAct) -> None:
        """The next instruction of the program."""
        match act:
            case HeadForward():
                with self._side.watch.measure("head"):
                    self._head_forward(act.micro)
            case TailStep():
                with self._side.watch.measure("tail"):
                    self._tail_step(act.micro)
            case HeadBackward():
                with self._side.watch.measure("head"):
                    self._head_backward(act.micro.piece)
            case Send():
                self._send(act)
            case Recv():
                self._recv(act)
            case Step():
                with self._side.watch.measure("tail"):
                    self._step()

    def _head_forward(self, micro: Micro) -> None:
        """Rows that the server's cache holds are left out."""
        piece, index, book = self._pieces[micro.piece], micro.piece, self._side.book
        wanted = list(range(len(piece.lengths)))
        if book is not None:
            held = book.enter(self._rows[index], piece.lengths)
            wanted = [row for row, here in enumerate(held) if not here]
        self._to_send[index] = wanted
        self._layouts[index] = self._side.head.layout_of(piece.ids_BT)
        rows = self._rows[index]
        self._side.shield.training(self._order.step, rows, [rows[row] for row in wanted])
        if not wanted:
            self._smashed[index] = torch.empty(0, 1, self._side.hidden_size, dtype=self._side.dtype)
            return
        whole = len(wanted) == len(piece.lengths)
        longest = max(piece.lengths[row] for row in wanted)
        ids_BT = piece.ids_BT if whole else piece.ids_BT[wanted, :longest]
        self._seed("head", micro)
        # What the shield does is part of the head's graph: the backward pass goes through it.
        exact_BTD, shield = self._side.head(ids_BT.to(self._side.device)), self._side.shield
        if not shield.keeps_all_of(exact_BTD, shield.config.clip_norm):
            self._hidden_faults.add(index)
        self._smashed[index] = shield.smashed(exact_BTD)

    def _head_backward(self, index: int) -> None:
        grad_BTD = self._grad_smashed.pop(index)
        if self._side.detector is not None:
            lengths, smashed_BTD = self._pieces[index].lengths, self._smashed[index]
            self._side.detector.returned(self._order.step, index, grad_BTD, lengths, smashed_BTD)
        self._smashed.pop(index).backward(grad_BTD)

    def _tail_step(self, micro: Micro) -> None:
        """Forward, loss, and back to the gradient of what the trunk sent."""
        side, piece = self._side, self._pieces[micro.piece]
        trunk_out_BTD, scale, divisor = self._trunk_out.pop(micro.piece)
        self._seed("tail", micro)
        loss_sum = tail_loss_sum(side.tail, trunk_out_BTD, *side.labels(piece), self._layouts[micro.piece])
        # The divisor is the same for all clients in this step, so gradients just add up.
        (loss_sum * scale / divisor).backward()
        loss = float(loss_sum.detach())
        self._loss_sum += loss
        assert trunk_out_BTD.grad is not None
        self._grads[micro.piece] = trunk_out_BTD.grad, math.isfinite(loss), scale

    def _seed(self, part: str, micro: Micro) -> None:
        """Just before what draws, so that it does not depend on what came between."""
        seed_dropout(self._side.train.seed, self._order.step, f"client-{self._side.client_id}-{part}-{micro.piece}")

    def _send(self, act: Send) -> None:
        step, index = self._order.step, act.micro.piece
        if act.kind is Kind.PART_GRADS:
            self._send_gradient()
        elif self._masked is not None:
            self._side.link.send(*self._masked.outgoing(act.kind))
        elif act.kind is Kind.ROWS:
            self._side.link.send(Header(kind=Kind.ROWS, step=step, micro=index), torch.tensor(self._rows[index]))
        elif act.kind is Kind.SMASHED:
            self._send_smashed(act.micro)
        else:
            piece = self._pieces[index]
            grad_BTD, finite, scale = self._grads.pop(index)
            shield = self._side.shield
            finite = finite and index not in self._hidden_faults
            finite = finite and shield.keeps_all_of(grad_BTD, shield.config.gradient_clip_norm)
            grad_BTD = shield.gradient(grad_BTD, piece.lengths, loss_scale=scale)
            if self._side.detector is not None and self._side.traits.head_learns:
                self._side.detector.sent(index, grad_BTD)
            flags = 0 if finite else LOSS_NOT_FINITE
            self._side.link.send_rows(act.kind, step, grad_BTD, piece.lengths, micro=index, flags=flags)

    def _send_smashed(self, micro: Micro) -> None:
        piece, index = self._pieces[micro.piece], micro.piece
        smashed_BTD = self._smashed[index].detach()
        if not self._side.traits.head_learns:
            del self._smashed[index]
        sent = [piece.lengths[row] for row in self._to_send.pop(index)]
        weight = float(piece.label_tokens)
        recorder = self._side.recorder
        with recorder.recording(piece, step=self._order.step, micro=index) if recorder else nullcontext():
            self._side.link.send_rows(
                Kind.SMASHED,
                self._order.step,
                smashed_BTD,
                piece.lengths,
                micro=index,
                weight=weight,
                sent=sent,
                layout=layout_numbers(self._layouts[index]),
            )

    def _send_gradient(self) -> None:
        """The square sum of the client parts' gradient, and the gradient itself where it is shared."""
        side, step = self._side, self._order.step
        vector = side.learner.flat_gradient() if side.traits.shares_gradient else None
        square_sum, flags = side.learner.square_sum(), 0
        if vector is not None and side.traits.secure:
            assert side.peers is not None, "the run exchanged no peer keys"
            # Without the loss scale, a power of two, which would take room that fixed point has not got.
            vector = vector / self._loss_scale
            fits = fits_fixed(vector, clients=len(self._order.clients))
            flags = 0 if fits else LOSS_NOT_FINITE  # fixed point has no way to say so
            self._masked = MaskedContribution(
                vector if fits else None,
                size=len(vector),
                peers=side.peers,
                client_id=side.client_id,
                cohort=self._order.clients,
                step=step,
                context=f"divisor {self._divisor.hex()} scale {self._loss_scale.hex()}",
            )
            vector, square_sum = None, 0.0  # the norm of a single client's gradient is not the server's business
        flags |= SPENT if self._is_spent() else 0
        side.link.send(Header(kind=Kind.PART_GRADS, step=step, square_sum=square_sum, flags=flags), vector)

    def _recv(self, act: Recv) -> None:
        side, index = self._side, act.micro.piece
        on_device = act.kind in (Kind.TRUNK_OUT, Kind.GRAD_SMASHED, Kind.STEP)
        frame = side.link.recv(act.kind, self._order.step, micro=index, on_device=on_device)
        header = frame.header
        if act.kind is Kind.TRUNK_OUT:
            trunk_out_BTD = pad(frame.payload, self._pieces[index].lengths).requires_grad_()
            self._trunk_out[index] = trunk_out_BTD, header.square_sum, header.weight
            self._loss_scale, self._divisor = header.square_sum, header.weight
        elif act.kind is Kind.GRAD_SMASHED:
            self._grad_smashed[index] = pad(frame.payload, self._pieces[index].lengths)
        elif act.kind is Kind.STEP:
            if side.traits.shares_gradient:
                side.learner.set_flat_gradient(frame.payload)
            self._norm, self._scale = header.square_sum, header.weight
            self._left_out = bool(header.flags & LEFT_OUT)
        else:
            assert self._masked is not None, "only a secure round gets a roster"
            self._masked.take(frame)

    def _step(self) -> None:
        """Step, or leave the step out with everybody: all know the same norm."""
        side, step = self._side, self._order.step
        decision = decide(side.train, scaled_norm=self._norm, scale=self._scale, step=step, steps=side.steps)
        if decision.finite:
            side.learner.step(factor=decision.factor, rate=decision.rate)
        elif side.skips or self._left_out:
            side.learner.clear()
        else:
            raise NonFinite(
                f"step {step + 1}: a loss, gradient or activation is not finite; nobody stepped (the trunk names whose)"
            )
