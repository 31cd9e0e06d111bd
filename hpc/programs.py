"""What one instruction of the schedule means for each role: its messages and computations, in order. Pure.

A client's program is a fixed sequence. The trunk's is one too, but for `pipelined`, where it takes what comes first:
there the program asks (`RecvAny`) and is told what came. Roles execute programs; tests pair the sends of one role
with the receives of the other, without processes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence, Set
from dataclasses import dataclass

from hpc.acts import (
    Backward,
    ClientAct,
    Combine,
    Forward,
    HeadBackward,
    HeadForward,
    Lost,
    Micro,
    Recv,
    RecvAny,
    Send,
    Step,
    TailStep,
    TrunkAct,
)
from hpc.config import Config, TrainConfig
from hpc.link.kinds import Kind
from hpc.schedule import Sync, TrainStep

HEAD_STARTS = 2  # micro-batches a client sends ahead: the trunk has the next one at hand while it works on one


@dataclass(kw_only=True, frozen=True)
class Traits:
    """What of the configuration decides which messages there are."""

    micro_batches: int
    head_learns: bool
    caches_smashed: bool
    shares_gradient: bool
    averages_parts: bool
    secure: bool
    first_come: bool

    @staticmethod
    def of(config: Config) -> Traits:
        train: TrainConfig = config.train
        return Traits(
            micro_batches=train.resolved_micro_batches,
            head_learns=config.head_learns,
            caches_smashed=config.caches_smashed,
            shares_gradient=train.resolved_aggregation == "gradient",
            averages_parts=train.resolved_aggregation == "fedavg",
            secure=train.secure_aggregation,
            first_come=train.schedule == "pipelined",
        )


TrunkProgram = Generator[TrunkAct, Recv | Lost | None, None]


def client_step(order: TrainStep, traits: Traits, client: int) -> Iterator[ClientAct]:
    """A client's part in one optimiser step."""
    if client not in order.clients:
        if traits.shares_gradient:  # it follows, so that all clients' parts stay equal
            yield Recv(Kind.STEP, Micro(client))
            yield Step()
        return
    micros = [Micro(client, index) for index in range(traits.micro_batches)]
    waiting = deque(micros)  # not yet sent
    behind: deque[Micro] = deque()  # their gradient has not come back
    for _ in range(min(HEAD_STARTS, len(micros))):
        yield from _head_start(waiting.popleft(), traits)
    for micro in micros:
        yield Recv(Kind.TRUNK_OUT, micro)
        yield TailStep(micro)
        yield Send(Kind.GRAD_TRUNK_OUT, micro)
        if traits.head_learns:
            behind.append(micro)
            if len(behind) >= HEAD_STARTS:
                yield from _head_end(behind.popleft())
        if waiting:
            yield from _head_start(waiting.popleft(), traits)
    for micro in behind:
        yield from _head_end(micro)
    yield Send(Kind.PART_GRADS, Micro(client))
    if traits.secure and traits.shares_gradient:
        yield from _client_masks(client)
    yield Recv(Kind.STEP, Micro(client))
    yield Step()


def _head_start(micro: Micro, traits: Traits) -> Iterator[ClientAct]:
    yield HeadForward(micro)
    if traits.caches_smashed:
        yield Send(Kind.ROWS, micro)
    yield Send(Kind.SMASHED, micro)


def _head_end(micro: Micro) -> Iterator[ClientAct]:
    yield Recv(Kind.GRAD_SMASHED, micro)
    yield HeadBackward(micro)


def trunk_step(order: TrainStep, traits: Traits, mine: Sequence[int]) -> TrunkProgram:
    """The part of a trunk rank with the clients `mine` in one optimiser step. All ranks combine together."""
    active = [client for client in order.clients if client in mine]
    if traits.first_come:
        yield from _first_come(order, traits, active)
    else:
        yield from _together(tuple(Micro(client) for client in active), traits)
    for client in active:
        yield Recv(Kind.PART_GRADS, Micro(client))
    if traits.secure and traits.shares_gradient:
        yield from _trunk_masks(active)
    yield Combine(Kind.PART_GRADS)
    for client in mine if traits.shares_gradient else active:
        yield Send(Kind.STEP, Micro(client))
    yield Step()


def _together(batch: tuple[Micro, ...], traits: Traits) -> Iterator[TrunkAct]:
    """All clients' rows as one batch."""
    for micro in batch:
        if traits.caches_smashed:
            yield Recv(Kind.ROWS, micro)
        yield Recv(Kind.SMASHED, micro)
    yield Combine(Kind.SMASHED)
    yield Forward(batch)
    for micro in batch:
        yield Send(Kind.TRUNK_OUT, micro)
    for micro in batch:
        yield Recv(Kind.GRAD_TRUNK_OUT, micro)
    yield Backward(batch)
    if traits.head_learns:
        for micro in batch:
            yield Send(Kind.GRAD_SMASHED, micro)


def _first_come(order: TrainStep, traits: Traits, active: Sequence[int]) -> TrunkProgram:
    """Micro-batch by micro-batch, whichever comes first; backward before forward, since it frees memory.

    What a client sends next follows from its own program, so the trunk knows what to await from each.
    """
    due = {client: deque(_sends_until_gradients(order, traits, client)) for client in active}
    ready: list[Recv] = []
    in_flight: set[Micro] = set()
    while ready or any(due.values()):
        busy = [micro.client for micro in in_flight]
        chosen = _choose(ready, full={client for client in active if busy.count(client) >= forward_limit(len(active))})
        awaited = tuple(frames[0] for frames in due.values() if frames)
        if awaited:
            answer = yield RecvAny(awaited, wait=chosen is None)
            if isinstance(answer, Lost):
                due.pop(answer.client)
                ready = [frame for frame in ready if frame.micro.client != answer.client]
                in_flight = {micro for micro in in_flight if micro.client != answer.client}
                continue
            if answer is not None:
                due[answer.micro.client].popleft()
                ready += [answer] if answer.kind is not Kind.ROWS else []
                continue
        assert chosen is not None, "nothing to wait for and nothing to do"
        ready.remove(chosen)
        in_flight ^= {chosen.micro}  # in with its forward pass, out with its backward pass
        yield from _work_on(chosen, traits)
    yield Combine(Kind.SMASHED)


def forward_limit(clients: int) -> int:
    """Most micro-batches of one client whose activations the trunk keeps at a time: one, or two if it is alone.

    For each client by itself, so that one that falls silent takes no other's place.
    """
    return 2 if clients == 1 else 1


def _choose(ready: Sequence[Recv], *, full: Set[int]) -> Recv | None:
    """The first backward pass, or else the first forward pass of a client that may have one more under way."""
    backward = next((frame for frame in ready if frame.kind is Kind.GRAD_TRUNK_OUT), None)
    return backward or next((frame for frame in ready if frame.micro.client not in full), None)


def _work_on(frame: Recv, traits: Traits) -> Iterator[TrunkAct]:
    if frame.kind is Kind.SMASHED:
        yield Forward((frame.micro,))
        yield Send(Kind.TRUNK_OUT, frame.micro)
    else:
        yield Backward((frame.micro,))
        if traits.head_learns:
            yield Send(Kind.GRAD_SMASHED, frame.micro)


def _sends_until_gradients(order: TrainStep, traits: Traits, client: int) -> Iterator[Recv]:
    for act in client_step(order, traits, client):
        if isinstance(act, Send):
            if act.kind is Kind.PART_GRADS:
                return
            yield Recv(act.kind, act.micro)


def client_sync(order: Sync, traits: Traits, client: int) -> Iterator[ClientAct]:
    """A client's part in an average."""
    if not traits.averages_parts:
        return
    if client in order.clients:
        if traits.secure:
            yield from _client_masks(client)
        else:
            yield Send(Kind.PARTS, Micro(client))
    yield Recv(Kind.AVERAGE, Micro(client))
    yield Step()


def trunk_sync(order: Sync, traits: Traits, mine: Sequence[int]) -> TrunkProgram:
    """The part of a trunk rank in an average."""
    active = [client for client in order.clients if client in mine]
    if traits.averages_parts:
        if traits.secure:
            yield from _trunk_masks(active)
        else:
            for client in active:
                yield Recv(Kind.PARTS, Micro(client))
        yield Combine(Kind.PARTS)
        for client in mine:
            yield Send(Kind.AVERAGE, Micro(client))
    yield Step()


def _client_masks(client: int) -> Iterator[ClientAct]:
    """Contribute under masks (`hpc.link.masks`)."""
    micro = Micro(client)
    yield Send(Kind.MASKED, micro)
    yield Recv(Kind.ROSTER, micro)
    yield Send(Kind.ATTEST, micro)
    yield Recv(Kind.TAGS, micro)
    yield Send(Kind.REVEAL, micro)


def _trunk_masks(active: Sequence[int]) -> Iterator[TrunkAct]:
    for received, sent in ((Kind.MASKED, Kind.ROSTER), (Kind.ATTEST, Kind.TAGS)):
        for client in active:
            yield Recv(received, Micro(client))
        yield Combine(received)
        for client in active:
            yield Send(sent, Micro(client))
    for client in active:
        yield Recv(Kind.REVEAL, Micro(client))
    yield Combine(Kind.REVEAL)
