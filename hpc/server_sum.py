"""The trunk ranks' side of sums over clients: under masks, and the average of parameters."""

from __future__ import annotations

import math
import time

import torch

from hpc.acts import Combine, Recv, Send, Step, TrunkAct
from hpc.errors import LinkError, ProtocolError
from hpc.link.frame import Frame, Header
from hpc.link.kinds import Kind
from hpc.link.masked_sum import ServerSum, relay_tags
from hpc.link.masks import checked_survivors, decode_fixed
from hpc.schedule import Sync
from hpc.server_side import ServerSide

_TAG_BYTES = 32


class ServedSum:
    """One secure round (`hpc.link.masks`), this rank's clients with the other ranks'."""

    def __init__(self, side: ServerSide, *, clients: tuple[int, ...], step: int) -> None:
        self._side, self._clients, self._step = side, clients, step
        self._sum = ServerSum(clients, step, size=side.part_values)
        self._tags: dict[int, torch.Tensor] = {}
        self._seeds: dict[int, torch.Tensor] = {}
        self._relayed: dict[int, torch.Tensor] = {}
        self._total: torch.Tensor | None = None
        self.survivors: tuple[int, ...] = ()

    def take(self, kind: Kind, client: int, frame: Frame) -> None:
        """What a client sent. Raises ProtocolError for what does not fit."""
        if kind is Kind.MASKED:
            self._sum.add(client, frame.payload)
        elif kind is Kind.ATTEST:
            self._tags[client] = frame.payload
        else:
            self._seeds[client] = frame.payload

    def combine(self, kind: Kind) -> None:
        """All of this kind that will come are here.

        Raises ProtocolError if too few clients are left, or one was lost after its vector had come.
        """
        if kind is Kind.MASKED:
            here = self._side.group.merge(dict.fromkeys(self._sum.survivors(), 1), self._side.train.clients)
            self.survivors = checked_survivors(self._clients, [client for client, came in here.items() if came])
        elif kind is Kind.ATTEST:
            self._relayed = relay_tags(self.survivors, self._everybodys_tags())
        else:
            partial = self._sum.unmask_partial(self.survivors, self._seeds)
            self._total = self._side.group.sum_tensor(partial)  # int64 wraps around, as the masks do

    def send(self, kind: Kind, client: int) -> None:
        if client not in self.survivors:
            return
        tensor = torch.tensor(self.survivors) if kind is Kind.ROSTER else self._relayed[client]
        self._side.served.send(client, Header(kind=kind, step=self._step), tensor)

    def result(self) -> torch.Tensor:
        """The sum over the survivors, float64."""
        assert self._total is not None, "the masks are not off yet"
        return decode_fixed(self._total)

    def _everybodys_tags(self) -> dict[int, torch.Tensor]:
        """Of all ranks' clients; a rank's own are the only non-zero rows it adds."""
        others = len(self.survivors) - 1
        table = torch.zeros(self._side.train.clients, others, _TAG_BYTES, dtype=torch.uint8)
        for client, tags in self._tags.items():
            if tags.shape != table[client].shape or tags.dtype != torch.uint8:
                due = f"due: {others} of {_TAG_BYTES} bytes"
                raise ProtocolError(f"client {client} sent tags of {tuple(tags.shape)}, {tags.dtype}; {due}")
            table[client] = tags
        came = self._side.group.merge(dict.fromkeys(self._tags, 1), self._side.train.clients)
        table = self._side.group.sum_tensor(table)
        return {client: table[client] for client, here in came.items() if here}


class SyncRun:
    """Carries out an average's program: client parts, and the trunk's replicas where there are any."""

    def __init__(self, side: ServerSide, order: Sync) -> None:
        self._side, self._order = side, order
        self._start = time.perf_counter()
        self._parts: dict[int, torch.Tensor] = {}
        self._secure = ServedSum(side, clients=order.clients, step=order.step) if side.traits.secure else None
        self._average: torch.Tensor | None = None

    def carry_out(self, act: TrunkAct) -> None:
        match act:
            case Recv():
                frame = self._side.served.recv(act, self._order.step, on_device=False)
                if frame is not None:
                    self._take_or_lose(act, frame)
            case Combine(kind=Kind.PARTS):
                self._work_out()
            case Combine() if self._secure is not None:
                self._secure.combine(act.kind)
            case Send(kind=Kind.AVERAGE):
                header = Header(kind=Kind.AVERAGE, step=self._order.step)
                self._side.served.send(act.micro.client, header, self._average)
            case Send() if self._secure is not None:
                self._secure.send(act.kind, act.micro.client)
            case Step():
                self._average_replicas()
                seconds = time.perf_counter() - self._start
                self._side.served.log.note("average", step=self._order.step, seconds=seconds)

    def _take_or_lose(self, due: Recv, frame: Frame) -> None:
        try:
            self._take(due, frame)
        except LinkError as error:
            self._side.served.lose(due.micro.client, self._order.step, error)

    def _take(self, due: Recv, frame: Frame) -> None:
        client = due.micro.client
        if due.kind is not Kind.PARTS:
            assert self._secure is not None, "only a secure round has masks"
            self._secure.take(due.kind, client, frame)
            return
        parts, size = frame.payload, self._side.part_values
        if parts.shape != (size,) or parts.dtype != torch.float32 or frame.header.weight != self._side.samples[client]:
            raise ProtocolError(
                f"client {client} sent parts of {tuple(parts.shape)}, {parts.dtype}, weighing {frame.header.weight:g}; "
                f"due: {(size,)}, float32, {self._side.samples[client]} examples"
            )
        self._parts[client] = parts

    def _weights(self) -> dict[int, int]:
        """Examples of those clients, of all ranks, whose parts count: those that are not lost."""
        if self._secure is not None and self._side.traits.averages_parts:
            here = list(self._secure.survivors)
        else:
            own = self._side.served.present(self._order.clients)
            if self._side.traits.averages_parts:
                own = [client for client in own if client in self._parts]
            merged = self._side.group.merge(dict.fromkeys(own, 1), self._side.train.clients)
            here = [client for client, came in merged.items() if came]
        return {client: self._side.samples[client] for client in here}

    def _work_out(self) -> None:
        """The weighted mean, in float64."""
        weights = self._weights()
        total = math.fsum(weights.values())
        if not weights:  # the whole cohort is lost: everybody keeps what it has
            return
        if self._secure is not None:  # clients weighted by their share of the whole cohort
            cohort = math.fsum(self._side.samples[client] for client in self._order.clients)
            mean = self._secure.result() * (cohort / total)
        else:
            mean = torch.zeros(self._side.part_values, dtype=torch.float64)
            for client, parts in sorted(self._parts.items()):
                mean += parts.double() * (weights[client] / total)
            mean = self._side.group.sum_tensor(mean)
        self._average = mean.float()

    def _average_replicas(self) -> None:
        if self._side.train.schedule != "replica":
            return
        weights = self._weights()
        if not weights:
            return
        own = {client: float(weight) for client, weight in weights.items() if client in self._side.served.channels}
        self._side.replicas.average(own, math.fsum(weights.values()), self._side.group.sum_tensor)
