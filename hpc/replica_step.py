"""A training step with each client's own trunk values, norm and decision.

Shape suffixes: B rows of several clients together, T longest row, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from hpc.acts import Micro
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.optim import Decision, global_norm
from hpc.server_step import ServedStep


class ReplicaStep(ServedStep):
    """Each client's own trunk values, norm and decision."""

    def _know_weights(self) -> None:
        pass

    def _divisor(self, client: int) -> float:
        return self._headers[Micro(client)].weight

    def _groups(self, batch: Sequence[Micro]) -> list[tuple[int, int]]:
        return [(micro.client, len(self._headers[micro].lengths)) for micro in batch]

    def _run_forward(self, batch: tuple[Micro, ...], smashed_BTD: torch.Tensor) -> torch.Tensor:
        replicas, learns = self._side.replicas, self._side.traits.head_learns
        groups = self._groups(batch) or replicas.idle_groups()
        if not groups:
            return smashed_BTD
        return replicas.forward(smashed_BTD, groups, input_learns=learns, layout_B2=self._layout(batch))

    def _run_backward(self, batch: tuple[Micro, ...], grad_BTD: torch.Tensor) -> torch.Tensor | None:
        idle = not batch and not self._side.replicas.idle_groups()
        return None if idle else self._side.replicas.backward(grad_BTD)

    def _agree(self) -> None:
        """For each client the norm over its own three parts."""
        side = self._side
        self._norms: dict[int, float] = {}
        self._decisions: dict[int, Decision] = {}
        for client, share in sorted(self._shares.items()):
            norm = global_norm(share.header.square_sum, side.replicas.square_sum(client))
            self._norms[client] = math.nan if client in self._causes else norm
            self._decisions[client] = self._decide(self._norms[client], self._scale)
        own = {client: 0 if decision.finite else 1 for client, decision in self._decisions.items()}
        failed = [client for client, code in side.group.merge(own, side.train.clients).items() if code]
        causes = self._all_causes()
        self._why = {client: causes.get(client, "gradient") for client in failed}
        side.skipped = side.skipped + 1 if failed else 0

    def decisions(self) -> Mapping[int, Decision]:
        return self._decisions

    def _send_step(self, client: int) -> None:
        if client in self._norms:
            header = Header(kind=Kind.STEP, step=self._order.step, square_sum=self._norms[client], weight=self._scale)
            self._side.served.send(client, header)

    def _step(self) -> None:
        side = self._side
        if self._why:
            self._leave_out(self._why)
        for client in self._mine:
            decision = self._decisions.get(client)
            if decision is not None and decision.finite:
                side.replicas.step(client, factor=decision.factor, rate=decision.rate)
            else:  # not finite, or lost on the way
                side.replicas.skip(client)
        side.loss_scale.update(finite=not self._why)
