"""The sending direction of a channel: chunk i+1 is sealed while chunk i is in flight."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from hpc.link.cipher import Cipher, NonceCounter
from hpc.link.frame import (
    BODY_BYTES,
    INLINE_BYTES,
    PREFIX_BYTES,
    Header,
    describe,
    encode,
    encode_prefix,
    payload_view,
)
from hpc.link.stats import LinkStats
from hpc.link.transport import Pending, Transport

_IN_FLIGHT_BYTES = 16 * 2**20  # sealed chunks that may wait for the peer before `send` does
_FIRSTS_IN_FLIGHT = 16


class _Message(NamedTuple):
    tensor: torch.Tensor
    view: memoryview  # of the tensor; kept, since making one costs microseconds


class _Buffers:
    """Reusable messages of one size; one is taken again only when its own send is through."""

    def __init__(self, size: int, limit: int) -> None:
        self._size, self._left = size, limit
        self.free: list[_Message] = []

    def take(self) -> _Message | None:
        """A message, or None when all are in flight."""
        if not self.free and self._left:
            self._left -= 1
            tensor = torch.empty(self._size, dtype=torch.uint8)
            return _Message(tensor, payload_view(tensor))
        return self.free.pop() if self.free else None


class Outgoing:
    """Seals frames and hands them to the transport, for one thread."""

    def __init__(
        self, transport: Transport, cipher: Cipher, *, chunk_bytes: int, timeout_s: float, stats: LinkStats
    ) -> None:
        self._transport, self._cipher, self._stats = transport, cipher, stats
        self._chunk_bytes, self._timeout_s = chunk_bytes, timeout_s
        self._nonces, self._sent = NonceCounter(), 0
        self._inline = INLINE_BYTES if transport.short_messages else 0
        self._header_end = PREFIX_BYTES + BODY_BYTES + cipher.overhead
        self._firsts = _Buffers(self._header_end + self._inline + cipher.overhead, _FIRSTS_IN_FLIGHT)
        self._chunks = _Buffers(chunk_bytes + cipher.overhead, max(4, _IN_FLIGHT_BYTES // chunk_bytes))
        self._in_flight: deque[tuple[Pending, _Message, _Buffers]] = deque()
        self.tap: Callable[[torch.Tensor], None] | None = None
        """Told of each sealed message as it leaves; the memory is used again."""

    def plain_header(self, header: Header, tensor: torch.Tensor | None) -> bytes:
        """The next frame's header in plain bytes. Raises ProtocolError for one that does not fit."""
        return encode_prefix(self._sent) + encode(describe(header, tensor, self._chunk_bytes))

    def send(self, plain_header: bytes, payload: memoryview) -> None:
        """Seal and post one frame. Raises PeerLost, NonceExhausted."""
        inline = len(payload) if len(payload) <= self._inline else 0
        self._send_first(plain_header, payload[:inline])
        for start in range(inline, len(payload), self._chunk_bytes):
            self._send_chunk(plain_header, payload[start : start + self._chunk_bytes])
        self._sent += 1
        self._stats.frames_sent += 1
        self._stats.payload_bytes_sent += len(payload)

    def flush(self, timeout_s: float) -> None:
        """Wait until everything has left. Raises PeerLost."""
        deadline = time.monotonic() + timeout_s
        while self._in_flight:
            self._reclaim(max(deadline - time.monotonic(), 0.0))

    def _send_first(self, plain_header: bytes, payload: memoryview) -> None:
        """The header, and a small payload right behind it."""
        message = self._take(self._firsts)
        view, end = message.view, self._header_end
        prefix, body = plain_header[:PREFIX_BYTES], plain_header[PREFIX_BYTES:]
        view[:PREFIX_BYTES] = prefix
        self._seal(body, prefix, view[PREFIX_BYTES:end])
        if len(payload):
            end += len(payload) + self._cipher.overhead
            self._seal(payload, plain_header, view[self._header_end : end])
        self._post(message, end, self._firsts)

    def _send_chunk(self, plain_header: bytes, plain: memoryview) -> None:
        message, end = self._take(self._chunks), len(plain) + self._cipher.overhead
        self._seal(plain, plain_header, message.view[:end])
        self._post(message, end, self._chunks)

    def _seal(self, plain: bytes | memoryview, aad: bytes, out: memoryview) -> None:
        start = time.perf_counter()
        self._cipher.seal_into(self._nonces.current(), plain, aad, out)
        self._nonces.advance()
        self._stats.seal_s += time.perf_counter() - start

    def _post(self, message: _Message, end: int, buffers: _Buffers) -> None:
        if self.tap is not None:
            self.tap(message.tensor[:end])
        self._in_flight.append((self._transport.send(message.tensor[:end]), message, buffers))
        self._stats.wire_bytes_sent += end

    def _take(self, buffers: _Buffers) -> _Message:
        while (message := buffers.take()) is None:
            self._reclaim(self._timeout_s)
        return message

    def _reclaim(self, timeout_s: float) -> None:
        """Wait for the oldest message to leave; its buffer is free again."""
        pending, message, buffers = self._in_flight[0]
        start = time.perf_counter()
        pending.wait(timeout_s, "its last frames to be taken")
        self._stats.wire_s += time.perf_counter() - start
        self._in_flight.popleft()
        buffers.free.append(message)
