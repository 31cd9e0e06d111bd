"""How clients come into a run: at the start, and again after they were lost.

Each says how much data it has, and where clients deal with each other, its signed key is passed on. A client that has
not got what the others have learned is given it by one of them, sealed so that the trunk relays what it cannot read.
All trunk ranks do this together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hpc.admission import Admission
from hpc.config import TrainConfig
from hpc.errors import LinkError, ProtocolError
from hpc.link.frame import DONATES, NEEDS_STATE, NOT_WRITTEN, Frame, Header
from hpc.link.kinds import Kind
from hpc.server_side import ServerSide

_log = logging.getLogger("hpc")


class Reception:
    """The trunk ranks' side."""

    def __init__(
        self,
        side: ServerSide,
        admission: Admission | None = None,
        *,
        on_return: Callable[[int], None] = lambda client: None,
    ) -> None:
        """`admission`: where clients may come back; `on_return` is called for each of this rank's that does."""
        self._side, self._admission, self._on_return = side, admission, on_return
        self._train: TrainConfig = side.train
        self._served, self._group = side.served, side.group
        self._keys: dict[int, torch.Tensor] = {}  # every client's signed key, of all ranks
        self._samples: dict[int, int] = {}
        self.eval_batches: dict[int, int] = {}

    def open(self, step: int) -> None:
        """Hear from every client that is here; give those that need it what the clients have learned."""
        heard = {client: self._hear(client) for client in self._served.present(self._served.channels)}
        told = {client: found for client, found in heard.items() if found is not None}
        self._take_up(told)
        sizes = self._merge({client: row[2] for client, row in told.items()})
        differing = {client: size for client, size in sizes.items() if client in self._here()}
        if len(set(differing.values())) > 1:
            raise ProtocolError(f"the clients' parts have different numbers of values that learn: {differing}")
        self._side.part_values = next(iter(differing.values()), 0)
        self._share_keys({client: key for client, (*_, key) in told.items()})
        if self._train.clients_meet:
            for owner in self._here():
                for client in self._served.present(self._served.channels):
                    if client != owner:
                        self._served.send(client, Header(kind=Kind.PEER_KEY, step=step), self._keys[owner])
        needing = self._merge({client: row[3] for client, row in told.items()})
        for client in self._here():
            if needing[client]:
                self._give_state(client, step, [each for each in self._here() if not needing[each]])
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
        told, admission = {}, self._admission
        mine = comer % self._group.ranks == self._group.rank
        if mine:
            assert admission is not None, "somebody has come"
            self._served.take_back(comer, admission.take(comer), step)
            self._on_return(comer)
            if (found := self._hear(comer)) is not None:
                told[comer] = found
        if not self._group.sum(len(told)):
            return
        self._take_up(told)
        self._share_keys({client: key for client, (*_, key) in told.items()})
        needs = bool(self._group.sum(sum(row[3] for row in told.values())))
        others = [client for client in self._here() if client != comer]
        if self._train.clients_meet:
            for client in others:
                self._introduce(client, comer, step, flags=0)
                if mine:
                    self._served.send(comer, Header(kind=Kind.PEER_KEY, step=step), self._keys[client])
        if needs and not self._give_state(comer, step, others):
            return
        if mine:
            self._say_begin(comer, step)
        if mine and comer not in self._served.lost:
            self._served.log.note("client_returned", step=step + 1, client_id=comer)
            _log.warning("client %d is back; it takes part from step %d on", comer, step + 1)

    def _hear(self, client: int) -> tuple[int, int, int, int, torch.Tensor | None] | None:
        """Evaluation batches, training examples, values that learn, whether it needs the state, and its signed key.

        None if it was lost.
        """
        try:
            ready = self._served.inbox.recv(client, Kind.READY, patience_s=self._served.start_patience_s)
            told, needs = ready.payload, bool(ready.header.flags & NEEDS_STATE)
            if told.shape != (3,) or told.dtype != torch.int64 or bool((told < 0).any()):
                raise ProtocolError(
                    f"client {client} sent READY of {tuple(told.shape)}, {told.dtype}; due: three numbers"
                )
            batches, samples, values = (int(number) for number in told)
            if self._side.part_values and values != self._side.part_values:
                raise ProtocolError(f"{values} values learn in client {client}; in the others {self._side.part_values}")
            meets = needs or self._train.clients_meet
            key = self._served.inbox.recv(client, Kind.PEER_KEY).tensor if meets else None
        except LinkError as error:
            self._served.lose(client, -1, error)
            return None
        return batches, samples, values, int(needs), key

    def _take_up(self, told: dict[int, tuple[int, int, int, int, torch.Tensor | None]]) -> None:
        self.eval_batches |= self._known(self._merge({client: row[0] for client, row in told.items()}))
        self._samples |= self._known(self._merge({client: row[1] for client, row in told.items()}))
        self._side.samples = [self._samples.get(client, 0) for client in range(self._train.clients)]

    def _share_keys(self, mine: dict[int, torch.Tensor | None]) -> None:
        """Every rank gets the keys that some rank's clients have told."""
        told = self._merge({client: 1 for client, key in mine.items() if key is not None})
        for owner in [client for client, here in told.items() if here]:
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
        sealed: Frame | None = self._served.recv_out_of_turn(donor, Kind.HANDOVER, step) if key is not None else None
        if key is None or sealed is None or sealed.header.flags & NOT_WRITTEN:
            return None
        return key.payload, sealed.payload

    def _say_begin(self, client: int, step: int) -> None:
        self._served.send(client, Header(kind=Kind.READY, step=step), torch.tensor(self._side.samples))

    def _here(self) -> list[int]:
        """The clients of all ranks that take part."""
        here = self._merge(dict.fromkeys(self._served.present(self._served.channels), 1))
        return [client for client, present in here.items() if present]

    def _merge(self, mine: dict[int, int]) -> dict[int, int]:
        return self._group.merge(mine, self._train.clients)

    def _known(self, merged: dict[int, int]) -> dict[int, int]:
        """Without those of whom nothing was told."""
        return {client: number for client, number in merged.items() if number}
