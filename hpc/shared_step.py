"""A training step with one set of trunk values, one norm and one decision for all clients.

Shape suffixes: B rows of several clients together, T longest row, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hpc.acts import Micro
from hpc.errors import ProtocolError
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.optim import Decision, global_norm, square_sum
from hpc.server_step import ServedStep


class SharedStep(ServedStep):
    """One set of trunk values, one norm and one decision for all clients."""

    def _know_weights(self) -> None:
        """Label tokens of all clients: known before the forward pass, or (first come first served) after the last."""
        came = list(self._headers)
        if self._side.traits.first_come:  # what a client did before it was lost is dropped
            here = self._side.served.present(self._mine)
            came = [micro for micro in self._grads if micro.client in here]
        self._label_tokens = self._side.group.sum(math.fsum(self._headers[micro].weight for micro in came))

    def _divisor(self, client: int) -> float:
        """Where the clients' label tokens are not known yet, a power of two: what it leaves over, `_rest` takes out."""
        if not self._side.traits.first_come:
            return self._label_tokens
        train = self._side.train
        return 2.0 ** math.floor(math.log2(len(self._order.clients) * train.per_client_batch_size))

    def _rest(self) -> float:
        """What the gradients are still to be divided by, once all that came are summed."""
        lost = [micro for micro in self._headers if micro not in self._grads]
        present = self._label_tokens
        if not self._side.traits.first_come:
            present -= self._side.group.sum(math.fsum(self._headers[micro].weight for micro in lost))
        return max(present, 1.0) / self._divisor(-1)

    def _run_forward(self, batch: tuple[Micro, ...], smashed_BTD: torch.Tensor) -> torch.Tensor:
        return self._side.shared.forward(smashed_BTD, batch=batch, input_learns=self._side.traits.head_learns)

    def _run_backward(self, batch: tuple[Micro, ...], grad_BTD: torch.Tensor) -> torch.Tensor | None:
        return self._side.shared.backward(grad_BTD, batch=batch)

    def _agree(self) -> None:
        """The norm over all parts, and the clients' summed gradient."""
        side = self._side
        self._scale_told, self._scale = self._scale, self._scale * self._rest()
        with side.watch.measure("trunk"):
            if side.traits.first_come:
                side.shared.finish_accumulation(side.served.present(self._mine))
            trunk_squares = side.shared.square_sum()
        self._summed = self._sum_gradients()
        if self._summed is None:
            squares = [self._shares[client].header.square_sum for client in sorted(self._shares)]
            part_squares = side.group.sum(math.fsum(squares))
        else:
            part_squares = square_sum([self._summed])
        causes = self._all_causes()
        # In fixed point a client that is not finite sends zeros: its word counts.
        norm = math.nan if causes else global_norm(part_squares, trunk_squares)
        self._norm, self._decision = norm, self._decide(norm, self._scale)
        side.skipped = 0 if self._decision.finite else side.skipped + 1
        self._why = causes

    def decisions(self) -> Mapping[int, Decision]:
        return dict.fromkeys(self._order.clients, self._decision)

    def _sum_gradients(self) -> torch.Tensor | None:
        """Summed in client order, then over trunk ranks; None unless they are shared."""
        side = self._side
        if not side.traits.shares_gradient:
            return None
        if side.traits.secure:
            return (self._secure_sum().result() * self._scale_told).float()
        vectors = [self._shares[client].payload for client in sorted(self._shares)]
        total = torch.zeros(side.part_values)
        for number, vector in enumerate(vectors):
            if vector.shape != total.shape or vector.dtype != torch.float32:
                who, due = f"client {sorted(self._shares)[number]}", f"due: {tuple(total.shape)}, float32"
                raise ProtocolError(f"{who} shares a gradient of {tuple(vector.shape)}, {vector.dtype}; {due}")
            total = vector if number == 0 else total.add_(vector)
        return side.group.sum_tensor(total)

    def _send_step(self, client: int) -> None:
        header = Header(kind=Kind.STEP, step=self._order.step, square_sum=self._norm, weight=self._scale)
        self._side.served.send(client, header, self._summed)

    def _step(self) -> None:
        """Step the trunk, or leave the step out with everybody."""
        side, decision = self._side, self._decision
        if not decision.finite:
            self._leave_out(self._why)
        side.loss_scale.update(finite=decision.finite)
        if decision.finite:
            side.shared.step(factor=decision.factor, rate=decision.rate)
        else:
            side.shared.skip()
