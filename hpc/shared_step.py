"""A training step with one set of trunk values, one norm and one decision for all clients.

Shape suffixes: B rows of several clients together, T longest row, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch

from hpc.acts import Micro
from hpc.link.frame import LEFT_OUT, Header
from hpc.link.kinds import Kind
from hpc.optim import Decision, global_norm, square_sum
from hpc.server_step import ServedStep


class SharedStep(ServedStep):
    """One set of trunk values, one norm and one decision for all clients."""

    def _know_weights(self) -> None:
        """Label tokens of all clients, before the forward pass; first come first served, they count in the end."""
        if not self._side.traits.first_come:
            self._label_tokens = self._tokens(self._headers)

    def _tokens(self, micros: Iterable[Micro]) -> float:
        return self._side.group.sum(math.fsum(self._headers[micro].weight for micro in micros))

    def _divisor(self, client: int) -> float:
        """Where the clients' label tokens are not known yet, a power of two: what it leaves over, `_rest` takes out."""
        if not self._side.traits.first_come:
            return self._label_tokens
        train = self._side.train
        return 2.0 ** math.floor(math.log2(len(self._order.clients) * train.per_client_batch_size))

    def _rest(self, here: Collection[int]) -> float:
        """What the gradients are still to be divided by: the label tokens of clients whose gradients count.

        0 if the step cannot be taken: nobody is left, or a client was lost when its rows were already in the trunk's
        gradient, but not its parts' gradient in the clients'.
        """
        counted = [micro for micro in self._grads if micro.client in here or not self._side.traits.first_come]
        halved = [micro for micro in counted if micro.client not in here]
        tokens, whole = self._tokens(counted), self._side.group.sum(len(halved)) == 0
        return tokens / self._divisor(-1) if whole and tokens else 0.0

    def _run_forward(self, batch: tuple[Micro, ...], smashed_BTD: torch.Tensor) -> torch.Tensor:
        return self._side.shared.forward(
            smashed_BTD, batch=batch, input_learns=self._side.traits.head_learns, layout_B2=self._layout(batch)
        )

    def _run_backward(self, batch: tuple[Micro, ...], grad_BTD: torch.Tensor) -> torch.Tensor | None:
        return self._side.shared.backward(grad_BTD, batch=batch)

    def _agree(self) -> None:
        """The norm over all parts, and the clients' summed gradient."""
        side = self._side
        here = self._whose_count()
        rest = self._rest(here)
        self._left_out = rest == 0
        self._scale_told, self._scale = self._scale, self._scale * (rest or 1.0)
        with side.watch.measure("trunk"):
            if side.traits.first_come:
                side.shared.finish_accumulation(here)
            trunk_squares = side.shared.square_sum()
        self._summed = self._sum_gradients()
        if self._summed is None:
            squares = [self._shares[client].header.square_sum for client in sorted(self._shares)]
            part_squares = side.group.sum(math.fsum(squares))
        else:
            part_squares = square_sum([self._summed])
        causes = self._all_causes()
        # In fixed point a client that is not finite sends noise: its word counts.
        norm = math.nan if causes or self._left_out else global_norm(part_squares, trunk_squares)
        self._norm, self._decision = norm, self._decide(norm, self._scale)
        if not self._left_out:
            side.skipped = 0 if self._decision.finite else side.skipped + 1
        self._why = causes

    def decisions(self) -> Mapping[int, Decision]:
        return dict.fromkeys(self._order.clients, self._decision)

    def _whose_count(self) -> list[int]:
        """This rank's clients that are here to the end of the step; under masks, those whose vectors came."""
        if self._side.traits.secure and self._side.traits.shares_gradient:
            return [client for client in self._secure_sum().survivors if client in self._shares]
        return sorted(self._shares)

    def _sum_gradients(self) -> torch.Tensor | None:
        """Summed in client order, then over trunk ranks; None unless they are shared."""
        side = self._side
        if not side.traits.shares_gradient:
            return None
        if side.traits.secure:
            return (self._secure_sum().result() * self._scale_told).float()
        first, *others = [self._shares[client].payload for client in sorted(self._shares)] or [
            torch.zeros(side.part_values)
        ]
        for vector in others:
            first += vector
        return side.group.sum_tensor(first)

    def _send_step(self, client: int) -> None:
        flags = LEFT_OUT if self._left_out else 0
        header = Header(kind=Kind.STEP, step=self._order.step, flags=flags, square_sum=self._norm, weight=self._scale)
        self._side.served.send(client, header, self._summed)

    def _step(self) -> None:
        """Step the trunk, or leave the step out with everybody."""
        side, decision = self._side, self._decision
        if not self._left_out:
            if not decision.finite:
                self._leave_out(self._why)
            side.loss_scale.update(finite=decision.finite)
        if decision.finite:
            side.shared.step(factor=decision.factor, rate=decision.rate)
        else:
            side.shared.skip()
