"""Links over Gloo (TCP): a process group of two ranks for each link, so that a dead peer breaks one link only.

No default group is involved; DeepSpeed's world is the trunk ranks alone.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpc.errors import PeerLost
from hpc.link.transport import Pending, lost

SERVER, CLIENT = 0, 1  # ranks of a link
_TAGS = 2**30  # message numbers wrap here; Gloo's tags are 32 bits


class _GlooPending:
    def __init__(self, work: dist.Work, buffer: torch.Tensor, peer: str) -> None:
        # Gloo works on raw memory: the buffer must live as long as the work.
        self._work, self._buffer, self._peer = work, buffer, peer
        self._done = False

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        if self._done:
            return
        start = time.monotonic()
        try:
            # Gloo counts whole milliseconds and takes 0 for no limit at all.
            self._work.wait(timedelta(milliseconds=max(int(timeout_s * 1000), 1)))
        except RuntimeError as error:
            raise lost(self._peer, what, time.monotonic() - start, _reason(error)) from None
        self._done = True


class GlooTransport:
    """One end of a two-rank Gloo link."""

    name = "gloo"
    short_messages = True

    def __init__(self, group: dist.ProcessGroupGloo, *, rank: int, peer: str) -> None:
        self._group: Any = group  # torch's stubs do not know a backend's send and recv
        self._other, self.peer = 1 - rank, peer
        self._sent = self._received = 0

    def send(self, buffer: torch.Tensor) -> Pending:
        try:
            work = self._open().send([buffer], self._other, self._sent % _TAGS)
        except RuntimeError as error:
            raise lost(self.peer, "a message to leave", 0.0, _reason(error)) from None
        self._sent += 1
        return _GlooPending(work, buffer, self.peer)

    def recv(self, buffer: torch.Tensor) -> Pending:
        try:
            work = self._open().recv([buffer], self._other, self._received % _TAGS)
        except RuntimeError as error:
            raise lost(self.peer, "the next message", 0.0, _reason(error)) from None
        self._received += 1
        return _GlooPending(work, buffer, self.peer)

    def close(self) -> None:
        self._group = None  # its destructor closes the socket

    def _open(self) -> Any:
        if self._group is None:
            raise PeerLost(f"{self.peer}: this end has closed the link")
        return self._group


def connect_gloo(
    store: dist.Store, *, client_id: int, rank: int, timeout_s: float, peer: str, epoch: int = 0, address: str = ""
) -> GlooTransport:
    """Meet the other end of client `client_id`'s link in `store`; `rank` is SERVER or CLIENT.

    `address`: this machine's, to listen at and to start from; empty: what its host name leads to.
    A client that comes back meets its trunk rank under the next `epoch`. Raises PeerLost after `timeout_s` seconds.
    """
    start = time.monotonic()
    prefix = dist.PrefixStore(f"link/{client_id}/{epoch}", store)
    try:
        group = dist.ProcessGroupGloo(prefix, rank, 2, _options(address, timeout_s))
    except (RuntimeError, ValueError) as error:
        raise lost(peer, "it to come to the link", time.monotonic() - start, _reason(error)) from None
    return GlooTransport(group, rank=rank, peer=peer)


def _options(address: str, timeout_s: float) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = timedelta(seconds=timeout_s)
    options._devices = [gloo.create_device(hostname=address) if address else gloo.create_default_device()]
    return options


def _reason(error: Exception) -> str:
    """Gloo's long texts in a few words."""
    text = str(error)
    if "Timed out" in text or "timeout" in text.lower():
        return "silent"
    if "closed by peer" in text or "reset by peer" in text or "Broken pipe" in text:
        return "connection closed, the process ended or died,"
    return f"connection failed ({text.splitlines()[0][:160] if text else type(error).__name__})"
