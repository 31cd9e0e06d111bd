"""How clients come into a run: at the start, and again after they were lost.

Each says how much data it has, and where clients deal with each other, its signed key is passed on. A client that has
not got what the others have learned is given it by one of them, sealed so that the trunk relays what it cannot read.
All trunk ranks do this together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hpc.admission import Admission
from hpc.config import TrainConfig
from hpc.errors import IdentityError, LinkError, PeerLost, ProtocolError
from hpc.link.frame import DONATES, HAS_START, NEEDS_STATE, NOT_WRITTEN, Frame, Header
from hpc.link.kinds import Kind
from hpc.link.limits import SIGNED_KEY_BYTES
from hpc.server_side import ServerSide

_log = logging.getLogger("hpc")


@dataclass(kw_only=True, frozen=True)
class Told:
    """What a client says of itself when it comes."""

    batches: int
    """Of held-out examples."""
    samples: int
    """Training examples."""
    values: int
    """That learn in its parts."""
    needs_state: bool
    has_start: bool
    key: torch.Tensor | None
    """Its signed key (uint8)."""


class Reception:
    """The trunk ranks' side."""

    def __init__(
        self,
        side: ServerSide,
        admission: Admission | None = None,
        *,
        most_batches: int = 0,
        on_return: Callable[[int], None] = lambda client: None,
        check_key: Callable[[int, bytes], None] = lambda client, message: None,
    ) -> None:
        """`admission`: where clients may come back; `most_batches` of held-out examples are possible; `on_return` is
        called for each of this rank's that is back; `check_key` raises `IdentityError` for a key that is not its own.
        """
        self._side, self._admission, self._on_return, self._check_key = side, admission, on_return, check_key
        self._train: TrainConfig = side.train
        self._served, self._group = side.served, side.group
        self._most_batches = most_batches
        self._keys: dict[int, torch.Tensor] = {}  # every client's signed key, of all ranks
        self._samples: dict[int, int] = {}
        self.eval_batches: dict[int, int] = {}

    def open(self, step: int) -> None:
        """Hear from every client that is here; give those that need it what the clients have learned.

        Raises `PeerLost` where clients deal with each other and one is not here.
        """
        heard = {client: self._hear(client) for client in self._served.present(self._served.channels)}
        told = {client: found for client, found in heard.items() if found is not None}
        self._take_up(told)
        here = self.here()
        if self._train.clients_meet and len(here) < self._train.clients:
            absent = [client for client in range(self._train.clients) if client not in here]
            raise PeerLost(
                f"clients {absent} are not here; secure aggregation and hand-over need every client at the start"
            )
        sizes = self._merge({client: each.values for client, each in told.items()})
        differing = {client: sizes[client] for client in here}
        if len(set(differing.values())) > 1:
            raise ProtocolError(f"the clients' parts have different numbers of values that learn: {differing}")
        self._side.part_values = next(iter(differing.values()), 0)
        if self._side.part_values:
            self._served.expect_parts(self._side.part_values)
        self._share_keys(told)
        if self._train.clients_meet:
            for owner in here:
                for client in self._served.present(self._served.channels):
                    if client != owner:
                        self._served.send(client, Header(kind=Kind.PEER_KEY, step=step), self._keys[owner])
        # Before the first step nobody has learned anything, and all begin alike.
        lacking = self._merge({client: not each.has_start for client, each in told.items() if step})
        for client in here:
            if lacking[client]:
                self._give_state(client, step, [each for each in here if not lacking[each]])
        for client in self._served.present(self._served.channels):
            self._say_begin(client, step)

    def admit(self, step: int) -> None:
        """Take in those who have come back, before `step`. Where parameters are averaged, after an average only."""
        if self._admission is None or (self._train.averages and step % self._train.sync_every):
            return
        waiting = self._merge(dict.fromkeys(self._admission.arrived(), 1))
        for client in [client for client, waits in waiting.items() if waits]:
            self._admit(client, step)

    def _admit(self, comer: int, step: int) -> None:
        mine = comer % self._group.ranks == self._group.rank
        told = {comer: found} if mine and (found := self._let_in(comer, step)) is not None else {}
        if not self._group.sum(len(told)):
            return
        self._take_up(told)
        self._share_keys(told)
        needs = bool(self._group.sum(sum(each.needs_state for each in told.values())))
        others = [client for client in self.here() if client != comer]
        if self._train.clients_meet:
            for client in others:
                self._introduce(client, comer, step, flags=0)
            for client, key in self._keys.items() if mine else ():
                if client != comer:
                    self._served.send(comer, Header(kind=Kind.PEER_KEY, step=step), key)
        if needs and not self._give_state(comer, step, others):
            return
        if mine:
            self._say_begin(comer, step)
        if mine and comer not in self._served.lost:
            self._served.log.note("client_returned", step=step + 1, client_id=comer)
            _log.warning("client %d is back; it takes part from step %d on", comer, step + 1)

    def _let_in(self, comer: int, step: int) -> Told | None:
        """What one of this rank's clients says; None if it is gone again, or here already."""
        assert self._admission is not None, "somebody has come"
        knock = self._admission.take(comer)
        if knock is None:
            return None
        if self._served.is_here(comer):
            arguments = (comer, knock.channel)  # which takes as long as the other end likes
            threading.Thread(target=self._admission.turn_away, args=arguments, daemon=True).start()
            return None
        self._served.take_back(comer, knock.channel, step)
        self._on_return(comer)
        return self._hear(comer, knock.ready, knock.key)

    def _hear(self, client: int, ready: Frame | None = None, key: Frame | None = None) -> Told | None:
        """What the client says, if it has not been heard yet; None if it was lost."""
        inbox, patience_s = self._served.inbox, self._served.start_patience_s
        try:
            ready = ready or inbox.recv(client, Kind.READY, patience_s=patience_s)
            told, flags = ready.payload, ready.header.flags
            if told.shape != (3,) or told.dtype != torch.int64 or bool((told < 0).any()):
                raise ProtocolError(
                    f"client {client} sent READY of {tuple(told.shape)}, {told.dtype}; due: three numbers"
                )
            batches, samples, values = (int(number) for number in told)
            if self._side.part_values and values != self._side.part_values:
                raise ProtocolError(f"{values} values learn in client {client}; in the others {self._side.part_values}")
            if batches > self._most_batches:
                raise ProtocolError(f"client {client} has {batches} held-out batches; at most {self._most_batches}")
            if flags & NEEDS_STATE or self._train.clients_meet:
                key = key or inbox.recv(client, Kind.PEER_KEY)
                self._check_key(client, bytes_of(key, who=f"client {client}", most=SIGNED_KEY_BYTES))
        except (LinkError, IdentityError) as error:
            self._served.lose(client, -1, error if isinstance(error, LinkError) else ProtocolError(str(error)))
            return None
        return Told(
            batches=batches,
            samples=samples,
            values=values,
            needs_state=bool(flags & NEEDS_STATE),
            has_start=not flags & NEEDS_STATE or bool(flags & HAS_START),
            key=None if key is None else key.payload,
        )

    def _take_up(self, told: dict[int, Told]) -> None:
        self.eval_batches |= self._known(self._merge({client: each.batches for client, each in told.items()}))
        self._samples |= self._known(self._merge({client: each.samples for client, each in told.items()}))
        self._side.samples = [self._samples.get(client, 0) for client in range(self._train.clients)]

    def _share_keys(self, told: dict[int, Told]) -> None:
        """Every rank gets the keys that some rank's clients have told."""
        mine = {client: each.key for client, each in told.items() if each.key is not None}
        for owner in [client for client, here in self._merge(dict.fromkeys(mine, 1)).items() if here]:
            self._keys[owner] = self._group.share(mine.get(owner), owner=self._group.rank_of_client(owner))

    def _introduce(self, client: int, comer: int, step: int, *, flags: int) -> None:
        """Tell one of this rank's clients who has come, with its key."""
        header = Header(kind=Kind.WELCOME, step=step, micro=comer, flags=flags)
        if client in self._served.channels:
            self._served.send(client, header, torch.tensor(self._side.samples))
            self._served.send(client, Header(kind=Kind.PEER_KEY, step=step), self._keys[comer])

    def _give_state(self, comer: int, step: int, donors: list[int]) -> bool:
        """Let the first of `donors` that can give `comer` what the clients have learned; else `comer` is lost."""
        for donor in donors:
            self._introduce(donor, comer, step, flags=DONATES)
            given = self._from_donor(donor, step) if donor in self._served.channels else None
            if not self._group.sum(given is not None):
                continue
            owner = self._group.rank_of_client(donor)
            key = self._group.share(None if given is None else given[0], owner=owner)
            sealed = self._group.share(None if given is None else given[1], owner=owner)
            if comer in self._served.channels:
                self._served.send(comer, Header(kind=Kind.PEER_KEY, step=step, micro=donor), key)
                self._served.send(comer, Header(kind=Kind.HANDOVER, step=step, micro=donor), sealed)
            return True
        if comer in self._served.channels:
            why = f"client {comer} lacks what the clients have learned, and no other that is here could give it"
            self._served.lose(comer, step, ProtocolError(f"{why} (each needs the other's key in authorized_clients)"))
        return False

    def _from_donor(self, donor: int, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        key = self._served.recv_out_of_turn(donor, Kind.PEER_KEY, step)
        sealed = None if key is None else self._served.recv_out_of_turn(donor, Kind.HANDOVER, step)
        if key is None or sealed is None or sealed.header.flags & NOT_WRITTEN:
            return None
        try:
            self._check_key(donor, bytes_of(key, who=f"client {donor}", most=SIGNED_KEY_BYTES))
            bytes_of(sealed, who=f"client {donor}")
        except (LinkError, IdentityError) as error:
            self._served.lose(donor, step, error if isinstance(error, LinkError) else ProtocolError(str(error)))
            return None
        return key.payload, sealed.payload

    def _say_begin(self, client: int, step: int) -> None:
        self._served.send(client, Header(kind=Kind.READY, step=step), torch.tensor(self._side.samples))

    def here(self) -> list[int]:
        """The clients of all ranks that take part. Collective."""
        here = self._merge(dict.fromkeys(self._served.present(self._served.channels), 1))
        return [client for client, present in here.items() if present]

    def _merge(self, mine: Mapping[int, int]) -> dict[int, int]:
        return self._group.merge(dict(mine), self._train.clients)

    def _known(self, merged: dict[int, int]) -> dict[int, int]:
        """Without those of whom nothing was told."""
        return {client: number for client, number in merged.items() if number}


def bytes_of(frame: Frame, *, who: str, most: int | None = None) -> bytes:
    """A frame's payload, if it is a row of bytes. Raises `ProtocolError`."""
    found = frame.payload
    if found.dim() != 1 or found.dtype != torch.uint8 or not len(found) or (most and len(found) > most):
        name = frame.header.kind.name
        raise ProtocolError(f"{who} sent {name} of {tuple(found.shape)}, {found.dtype}; due: bytes")
    return b"" if most is None else found.numpy().tobytes()
