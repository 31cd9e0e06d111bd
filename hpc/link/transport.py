"""What a channel needs of a network: ordered messages in both directions, and a deadline on every wait.

`loopback_pair` is the transport of tests: two roles in threads of one process, real frames, real cipher.
`hpc.link.gloo`, `nccl` and `mpi` are the others.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch

from hpc.errors import PeerLost, ProtocolError, TamperError, TopologyError
from hpc.link.frame import payload_view


class Pending(Protocol):
    """A send or receive under way. Its buffer belongs to the transport until `wait` returns."""

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        """Return when the message has left, or has come.

        Raises PeerLost, naming the peer, `what` and the time, if the peer is gone or silent for `timeout_s` seconds.
        """


class Transport(Protocol):
    """Two-ended. Messages arrive in the order sent; receives may be posted ahead of their messages."""

    name: str
    peer: str
    short_messages: bool
    """Whether a message may be shorter than the buffer it is received into (the rest is left as it was)."""

    def send(self, buffer: torch.Tensor) -> Pending:
        """Send a contiguous CPU uint8 tensor."""

    def recv(self, buffer: torch.Tensor) -> Pending:
        """Receive into a contiguous CPU uint8 tensor, which must not be smaller than the message."""

    def close(self) -> None:
        """Give up the link; posted receives are dropped. May be called again."""


def choose_transport(requested: str, *, under_mpi: bool, distinct_gpus: bool) -> str:
    """`gloo`, `mpi` or `nccl`, with `auto` resolved. Raises TopologyError for one that cannot work here."""
    if requested == "auto":
        return "mpi" if under_mpi else "nccl" if distinct_gpus else "gloo"
    if requested == "mpi" and not under_mpi:
        raise TopologyError("--link.transport mpi needs a launch by mpirun or srun --mpi; or use --link.transport gloo")
    if requested == "nccl" and not distinct_gpus:
        raise TopologyError(
            "--link.transport nccl needs a GPU of its own on both ends of a link; use --link.transport gloo"
        )
    return requested


def post_bytes(transport: Transport, data: bytes) -> list[Pending]:
    """Send a length (8 bytes, little-endian) and the bytes, without waiting until they have left."""
    length = torch.tensor([len(data)], dtype=torch.int64).view(torch.uint8)
    parts = [length, torch.frombuffer(bytearray(data), dtype=torch.uint8)] if data else [length]
    return [transport.send(part) for part in parts]


def wait_all(pending: Iterable[Pending], *, timeout_s: float, what: str) -> None:
    """Wait for each, `timeout_s` seconds in all. Raises PeerLost."""
    deadline = time.monotonic() + timeout_s
    for each in pending:
        each.wait(max(deadline - time.monotonic(), 0.0), what)


def recv_bytes(transport: Transport, *, limit: int, timeout_s: float, what: str) -> bytes:
    """Counterpart of `post_bytes`. Raises ProtocolError, before any allocation, beyond `limit` bytes."""
    deadline = time.monotonic() + timeout_s
    length = torch.zeros(1, dtype=torch.int64)
    transport.recv(length.view(torch.uint8)).wait(timeout_s, what)
    size = int(length)
    if not 0 <= size <= limit:
        raise ProtocolError(f"{transport.peer} announces {size} bytes for {what}; at most {limit} are allowed")
    data = torch.empty(size, dtype=torch.uint8)
    if size:
        transport.recv(data).wait(max(deadline - time.monotonic(), 0.0), what)
    return bytes(payload_view(data))


def lost(peer: str, what: str, seconds: float, why: str) -> PeerLost:
    """The error of every transport, in one wording."""
    return PeerLost(f"{peer}: {why} after {seconds:.1f} s of waiting for {what}")


def peer_words(text: bytes | str, limit: int = 400) -> str:
    """What a peer said, fit for a terminal: one line, printable, at most `limit` characters."""
    if isinstance(text, bytes):
        text = text[: 4 * limit].decode("utf-8", errors="replace")
    kept = "".join(letter if letter.isprintable() else " " for letter in text[: limit + 1]).strip()
    return kept if len(kept) <= limit else kept[:limit] + "…"


class _Line:
    """One direction of a loopback: the messages not yet taken, and whether an end has closed."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: deque[_Sent] = deque()
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()


class _Sent:
    """A message whose memory is read only when the peer takes it, as real networks do."""

    def __init__(self, line: _Line, peer: str, buffer: torch.Tensor) -> None:
        self._line, self._peer, self.buffer, self.taken = line, peer, buffer, False

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        start = time.monotonic()
        with self._line.changed:
            self._line.changed.wait_for(lambda: self.taken or self._line.closed, timeout_s)
            if not self.taken:
                why = "closed the link" if self._line.closed else "took nothing"
                raise lost(self._peer, f"{what} to be taken", time.monotonic() - start, why)


class _Posted:
    def __init__(self, owner: LoopbackTransport, buffer: torch.Tensor) -> None:
        self._owner, self.buffer, self.done = owner, buffer, False

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        deadline = time.monotonic() + timeout_s
        while not self.done:
            self._owner.take(max(deadline - time.monotonic(), 0.0), timeout_s, what)


class LoopbackTransport:
    """One end of `loopback_pair`."""

    name = "loopback"
    short_messages = True

    def __init__(self, outgoing: _Line, incoming: _Line, peer: str) -> None:
        self._outgoing, self._incoming, self.peer = outgoing, incoming, peer
        self._posted: deque[_Posted] = deque()

    def send(self, buffer: torch.Tensor) -> Pending:
        sent = _Sent(self._outgoing, self.peer, buffer)
        with self._outgoing.changed:
            self._outgoing.messages.append(sent)
            self._outgoing.changed.notify_all()
        return sent

    def recv(self, buffer: torch.Tensor) -> Pending:
        posted = _Posted(self, buffer)
        self._posted.append(posted)
        return posted

    def take(self, timeout_s: float, whole_timeout_s: float, what: str) -> None:
        """Receive the next message into the buffer posted first."""
        line = self._incoming
        with line.changed:
            line.changed.wait_for(lambda: line.messages or line.closed, timeout_s)
            if not line.messages:
                why = "closed the link" if line.closed else "silent"
                raise lost(self.peer, what, whole_timeout_s if not line.closed else 0.0, why)
            message, posted = line.messages.popleft(), self._posted.popleft()
            size, room = message.buffer.numel(), posted.buffer.numel()
            if size > room:
                raise TamperError(f"{self.peer} sent {size} bytes for {what}, where {room} at most were due")
            posted.buffer[:size] = message.buffer
            posted.done = message.taken = True
            line.changed.notify_all()

    def close(self) -> None:
        self._outgoing.close()
        self._incoming.close()


def loopback_pair(first: str = "client", second: str = "server") -> tuple[LoopbackTransport, LoopbackTransport]:
    """Two connected ends for two threads; the first end's peer is called `second`, and the other way round."""
    there, back = _Line(), _Line()
    return LoopbackTransport(there, back, second), LoopbackTransport(back, there, first)
