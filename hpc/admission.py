"""Clients knock: whoever says in the store that it has started is linked and authenticated, at any time of the run.

A poller sees who knocks. A thread for each knock makes the link and the handshake and hears the client's first words,
so that one that dies while doing so, takes long to load its part, or has the wrong key, holds up nobody. Then it waits,
hearing ALIVE, until the run takes it in.

Whoever reaches the store can knock as any client, as often as it likes. So each client has a few places of its own,
and a knock that was refused keeps its place for a while. A stranger who knocks as one client costs that many threads,
delays that client by a handshake's deadline, and no other at all.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hpc.errors import HpcError, LinkError, PeerLost
from hpc.link.channel import Channel
from hpc.link.frame import NEEDS_STATE, Frame, Header
from hpc.link.kinds import Kind

POLL_S = 0.2
PLACES = 4  # knocks of one client that are dealt with at a time
LONGEST_PENANCE_S = 5.0  # for which a refused knock keeps its place, after several in a row

_log = logging.getLogger("hpc")


@dataclass(kw_only=True)
class Knock:
    """A client that waits to be taken in."""

    channel: Channel
    ready: Frame | None = None
    """Its first words; None: they are still to be heard."""
    key: Frame | None = None
    """Its signed key, if it is due with them."""
    taken: bool = False


class Admission:
    """Of one trunk rank. `starts` and `connect` are called in threads of their own."""

    def __init__(
        self,
        clients: Iterable[int],
        *,
        starts: Callable[[int], int],
        connect: Callable[[int, int], Channel],
        is_here: Callable[[int], bool],
        refused: Callable[[int, str], None],
        timeout_s: float,
        start_patience_s: float,
        clients_meet: bool,
    ) -> None:
        """`starts(client)`: how often it has started; `connect(client, epoch)`: the sealed channel to its start number
        `epoch` (from 0); `is_here`: whether its former process takes part still; `refused(client, why)` is told;
        `clients_meet`: a key follows upon every READY.
        """
        self._clients, self._starts, self._connect = tuple(clients), starts, connect
        self._is_here, self._refused, self._timeout_s = is_here, refused, timeout_s
        self._start_patience_s, self._clients_meet = start_patience_s, clients_meet
        self._changed = threading.Condition()
        self._arrived: dict[int, Knock] = {}
        self._knocks = dict.fromkeys(self._clients, 0)
        self._under_way = dict.fromkeys(self._clients, 0)
        self._refusals = dict.fromkeys(self._clients, 0)  # since one was let in
        self._begun = self._closed = False
        threading.Thread(target=self._poll, name="admission", daemon=True).start()

    def first(self, *, least: int) -> dict[int, Channel]:
        """Those who are linked when all are, or when `timeout_s` has passed; what they say is still to be heard.

        Raises PeerLost if fewer than `least` are. `least` counts this rank's clients.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._arrived) == len(self._clients), timeout=self._timeout_s)
            missing = ", ".join(f"client {client}" for client in self._clients if client not in self._arrived)
            if len(self._arrived) < least:
                raise PeerLost(f"{missing} did not come within --link.timeout_s {self._timeout_s:g} s")
            self._begun = True
            here = sorted(self._arrived)
            found = {client: self._take(client) for client in here}
        return {client: knock.channel for client, knock in found.items() if knock is not None}

    def arrived(self) -> list[int]:
        """Clients that wait to be taken in."""
        with self._changed:
            return sorted(self._arrived)

    def take(self, client: int) -> Knock | None:
        """Its channel, which from now on is the caller's, and what it said; None if it has gone away meanwhile."""
        with self._changed:
            return self._take(client)

    def _take(self, client: int) -> Knock | None:
        knock = self._arrived.pop(client, None)
        if knock is not None:
            knock.taken = True
            self._changed.notify_all()
        return knock

    def close(self, *, paused: bool = False) -> None:
        """Nobody is admitted any more; whoever waits is told."""
        with self._changed:
            self._closed = True
            waiting, self._arrived = list(self._arrived.values()), {}
            self._changed.notify_all()
        for knock in waiting:
            if paused:
                with contextlib.suppress(LinkError):
                    knock.channel.send(Header(kind=Kind.PAUSE))
            else:
                knock.channel.send_error("the run is over", grace_s=1)
            knock.channel.close(grace_s=1)

    def _poll(self) -> None:
        while not self._closed:
            for client in self._clients:
                try:
                    starts = self._starts(client)
                except (RuntimeError, OSError) as error:
                    _log.info("whether client %d has started is not known for now: %s", client, error)
                    continue
                self._let_knock(client, starts)
            time.sleep(POLL_S)

    def _let_knock(self, client: int, starts: int) -> None:
        """Begin with as many as there are places for; the others are looked at again, the newest PLACES of them."""
        first = max(self._knocks[client], starts - PLACES)
        end = min(starts, first + PLACES - self._under_way[client])
        for epoch in range(first, end):
            with self._changed:
                self._under_way[client] += 1
            name = f"admit-{client}-{epoch}"
            threading.Thread(target=self._admit_one, args=(client, epoch), name=name, daemon=True).start()
        self._knocks[client] = max(first, end)

    def _admit_one(self, client: int, epoch: int) -> None:
        refused = self._admit(client, epoch)
        with self._changed:
            self._refusals[client] = self._refusals[client] + 1 if refused else 0
            penance_s = min(POLL_S * 2 ** min(self._refusals[client], 10), LONGEST_PENANCE_S) if refused else 0.0
            self._changed.wait_for(lambda: self._closed, penance_s)
            self._under_way[client] -= 1

    def _admit(self, client: int, epoch: int) -> bool:
        """Deal with one knock to its end. Returns whether it was refused."""
        try:
            knock = Knock(channel=self._connect(client, epoch))
            if self._is_here(client):
                self.turn_away(client, knock.channel)
                return True
            if self._begun:  # nobody waits while it loads its part
                self._hear(knock)
        except HpcError as error:
            self._refused(client, str(error))
        except Exception as error:  # a thread's traceback would go unseen
            self._refused(client, f"{type(error).__name__}: {error}")
        else:
            self._offer(client, knock)
            return False
        return True

    def _hear(self, knock: Knock) -> None:
        knock.ready = knock.channel.recv(Kind.READY, patience_s=self._start_patience_s)
        if self._clients_meet or knock.ready.header.flags & NEEDS_STATE:
            knock.key = knock.channel.recv(Kind.PEER_KEY)

    def _offer(self, client: int, knock: Knock) -> None:
        """Until it is taken, its own deadline must not run out."""
        with self._changed:
            if self._closed:
                return
            self._arrived[client] = knock
            self._changed.notify_all()
            while True:
                self._changed.wait(self._timeout_s / 4)
                if knock.taken or self._closed:
                    return
                if self._arrived.get(client) is not knock:  # it has died meanwhile, and came anew
                    break
                try:
                    knock.channel.send(Header(kind=Kind.ALIVE))
                except LinkError as error:
                    _log.info("client %d went away before it was taken in: %s", client, error)
                    del self._arrived[client]
                    break
        with contextlib.suppress(LinkError):
            knock.channel.close(grace_s=0.1)

    def turn_away(self, client: int, channel: Channel) -> None:
        """It is here already. Say so, and hold the link until the other end has read it: what it sends meanwhile would
        break a closed one.
        """
        why = f"client {client} takes part already, from another process; end that one first"
        self._refused(client, why)
        channel.send_error(why)
        deadline = time.monotonic() + self._start_patience_s
        with contextlib.suppress(LinkError):
            while (left := deadline - time.monotonic()) > 0:
                channel.recv(patience_s=left)
        channel.close(grace_s=0.1)
