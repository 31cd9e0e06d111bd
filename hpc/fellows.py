"""What a client knows of the other clients: their keys, how many examples they have; and what it does for a comer."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from hpc.config import TrainConfig
from hpc.errors import IdentityError, LinkError, ProtocolError
from hpc.learner import Learner
from hpc.link.frame import DONATES, NOT_WRITTEN, Frame, Header
from hpc.link.kinds import Kind
from hpc.link.peers import PeerKeys
from hpc.trunk_link import TrunkLink

_log = logging.getLogger("hpc")


class Fellows:
    """The other clients as one client sees them: through the trunk, which relays what it cannot read."""

    def __init__(
        self,
        *,
        client_id: int,
        train: TrainConfig,
        link: TrunkLink,
        learner: Learner,
        peers: PeerKeys | None,
        make_peers: Callable[[], PeerKeys] | None,
    ) -> None:
        """`make_peers`: keys for other clients, where a run without need of them has one that comes back."""
        self._client_id, self._train, self._link, self._learner = client_id, train, link, learner
        self.peers, self._make_peers = peers, make_peers
        self.samples: list[int] = []
        """Training examples of every client, told by the trunk."""
        self.drifted = False
        """Whether this client's parts are its own until the next average."""

    def keys(self) -> PeerKeys:
        """This client's keys for the others, made when they are first needed."""
        if self.peers is None:
            assert self._make_peers is not None, "only where clients may come back"
            self.peers = self._make_peers()
        return self.peers

    def send_key(self, step: int) -> None:
        """Give the others, through the trunk, the public half of this client's key for them."""
        message = torch.frombuffer(bytearray(self.keys().public_message()), dtype=torch.uint8)
        self._link.send(Header(kind=Kind.PEER_KEY, step=step), message)

    def hear_until_ready(self, patience_s: float) -> Frame:
        """Take up the others' keys, and what they have learned if one sends it, until the trunk says READY."""
        due = (Kind.PEER_KEY, Kind.HANDOVER, Kind.READY)
        while (frame := self._link.recv_next(*due, patience_s=patience_s)).header.kind is not Kind.READY:
            if frame.header.kind is Kind.PEER_KEY:
                self.keys().add(frame.payload.numpy().tobytes())
            else:
                self._learner.load_state(self.keys().open(frame.header.micro, frame.payload))
        return frame

    def welcome(self, told: Frame, key: Frame) -> None:
        """Another client has come: know its key, and give it what the clients have learned if this one is asked to.

        That is what was learned up to the last step: whatever has begun of the next does not count yet.
        """
        comer, step, donates = told.header.micro, told.header.step, bool(told.header.flags & DONATES)
        if donates and not (self._train.shares_state and not self.drifted):
            raise ProtocolError(
                f"the trunk wants this client's own parts for client {comer}; nobody else may have them"
            )
        self.samples = told.payload.tolist()
        if not donates and not self._train.clients_meet:
            return
        try:
            self.keys().add(key.payload.numpy().tobytes())
        except (IdentityError, LinkError) as error:
            if not donates:
                raise
            _log.warning("client %d cannot give client %d what was learned: %s", self._client_id, comer, error)
            self.send_key(step)
            self._link.send(Header(kind=Kind.HANDOVER, step=step, micro=comer, flags=NOT_WRITTEN))
            return
        if donates:
            self.send_key(step)
            self.give(comer, step)

    def give(self, receiver: int, step: int) -> None:
        """This client's parts and moments, sealed for another one."""
        sealed = self.keys().seal(receiver, self._learner.state())
        self._link.send(Header(kind=Kind.HANDOVER, step=step, micro=receiver), sealed)

    def take(self, sender: int) -> None:
        """Another client's parts and moments in place of this one's."""
        self._learner.load_state(self.keys().open(sender, self._link.recv_next(Kind.HANDOVER).payload))
