"""Clients knock: whoever says in the store that it has started is linked and authenticated, at any time of the run.

A poller sees who knocks; a thread for each knock makes the link and the handshake, so that a client that dies while
doing so, or has the wrong key, holds up nobody. Then it waits, hearing ALIVE, until the run takes it in.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable

from hpc.errors import HpcError, LinkError, PeerLost
from hpc.link.channel import Channel
from hpc.link.frame import Header
from hpc.link.kinds import Kind

POLL_S = 0.2

_log = logging.getLogger("hpc")


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
    ) -> None:
        """`starts(client)`: how often it has started; `connect(client, epoch)`: the sealed channel to its start number
        `epoch` (from 0); `is_here`: whether its former process takes part still; `refused(client, why)` is told.
        """
        self._clients, self._starts, self._connect = tuple(clients), starts, connect
        self._is_here, self._refused, self._timeout_s = is_here, refused, timeout_s
        self._changed = threading.Condition()
        self._arrived: dict[int, Channel] = {}
        self._knocks = dict.fromkeys(self._clients, 0)
        self._closed = False
        threading.Thread(target=self._poll, name="admission", daemon=True).start()

    def first(self, *, least: int) -> dict[int, Channel]:
        """Those who are there when all are, or when `timeout_s` has passed. Raises PeerLost if fewer than `least` are.

        `least` counts this rank's clients.
        """
        deadline = time.monotonic() + self._timeout_s
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._arrived) == len(self._clients), timeout=max(0.0, deadline - time.monotonic())
            )
            here = sorted(self._arrived)
        if len(here) < least:
            missing = ", ".join(f"client {client}" for client in self._clients if client not in here)
            raise PeerLost(f"{missing} did not come within --link.timeout_s {self._timeout_s:g} s")
        return {client: self.take(client) for client in here}

    def arrived(self) -> list[int]:
        """Clients that wait to be taken in."""
        with self._changed:
            return sorted(self._arrived)

    def take(self, client: int) -> Channel:
        """Its channel, which from now on is the caller's."""
        with self._changed:
            return self._arrived.pop(client)

    def close(self) -> None:
        """Nobody is admitted any more; whoever waits is told."""
        with self._changed:
            self._closed = True
            waiting, self._arrived = list(self._arrived.values()), {}
        for channel in waiting:
            channel.send_error("the run is over", grace_s=1)
            channel.close(grace_s=1)

    def _poll(self) -> None:
        while not self._closed:
            for client in self._clients:
                try:
                    starts = self._starts(client)
                except (RuntimeError, OSError):  # the store is gone, and with it the run
                    return
                if starts > self._knocks[client]:
                    self._knocks[client] = starts
                    name = f"admit-{client}-{starts - 1}"
                    threading.Thread(target=self._admit, args=(client, starts - 1), name=name, daemon=True).start()
            time.sleep(POLL_S)

    def _admit(self, client: int, epoch: int) -> None:
        try:
            channel = self._connect(client, epoch)
        except HpcError as error:
            self._refused(client, str(error))
            return
        except Exception as error:  # a thread's traceback would go unseen
            self._refused(client, f"{type(error).__name__}: {error}")
            return
        if self._is_here(client):
            why = f"client {client} takes part already, from another process; end that one first"
            self._refused(client, why)
            _turn_away(channel, why, self._timeout_s)
            return
        self._offer(client, channel)

    def _offer(self, client: int, channel: Channel) -> None:
        """Until it is taken, its own deadline must not run out."""
        with self._changed:
            if self._closed:
                return
            self._arrived[client] = channel
            self._changed.notify_all()
            while True:
                self._changed.wait(self._timeout_s / 4)
                if client not in self._arrived:
                    return
                if self._arrived[client] is not channel:  # it has died meanwhile, and came anew
                    break
                try:
                    channel.send(Header(kind=Kind.ALIVE))
                except LinkError as error:
                    _log.info("client %d went away before it was taken in: %s", client, error)
                    del self._arrived[client]
                    break
        with contextlib.suppress(LinkError):
            channel.close(grace_s=0.1)


def _turn_away(channel: Channel, why: str, timeout_s: float) -> None:
    """Say why, and hold the link until the other end has read it: what it sends meanwhile would break a closed one."""
    channel.send_error(why)
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(LinkError):
        while (left := deadline - time.monotonic()) > 0:
            channel.recv(patience_s=left)
    channel.close(grace_s=0.1)
