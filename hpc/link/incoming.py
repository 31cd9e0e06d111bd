"""The receiving direction of a channel: later chunks are on the wire while one is opened."""

from __future__ import annotations

import time
from collections import deque

import torch

from hpc.errors import ProtocolError, TamperError
from hpc.link.cipher import Cipher, NonceCounter
from hpc.link.frame import (
    BODY_BYTES,
    INLINE_BYTES,
    PREFIX_BYTES,
    Frame,
    Header,
    Kind,
    check_prefix,
    decode,
    empty_like_header,
    payload_view,
)
from hpc.link.limits import Limits
from hpc.link.stats import LinkStats
from hpc.link.transport import Pending, Transport

_POSTED_CHUNKS = 3  # receives ahead of the chunk that is opened


class Incoming:
    """Receives and opens frames, for one thread."""

    def __init__(
        self, transport: Transport, cipher: Cipher, *, timeout_s: float, stats: LinkStats, limits: Limits
    ) -> None:
        self._limits = limits
        self._transport, self._cipher, self._timeout_s, self._stats = transport, cipher, timeout_s, stats
        self._nonces, self._received = NonceCounter(), 0
        self.heard = time.monotonic()
        self._inline = INLINE_BYTES if transport.short_messages else 0
        self._header_end = PREFIX_BYTES + BODY_BYTES + cipher.overhead
        first = self._header_end + self._inline + cipher.overhead if self._inline else self._header_end
        # Two: the next header's receive is posted before this one's payload is opened. Zeros, here and below: a
        # message cut short must not be completed by what the memory held before.
        self._spare_firsts = deque(torch.zeros(first, dtype=torch.uint8) for _ in range(2))
        self._first: tuple[Pending, torch.Tensor] | None = None
        self._landing = [torch.empty(0, dtype=torch.uint8)] * (_POSTED_CHUNKS + 1)

    def post(self) -> None:
        """Have a receive ready for the next header; without one, the network asks back first (a round trip)."""
        if self._first is None:
            message = self._spare_firsts.popleft()
            self._first = self._transport.recv(message), message

    def recv(self, kinds: tuple[Kind, ...], device: torch.device | None, patience_s: float | None = None) -> Frame:
        """The next frame, or an ERROR frame. Raises PeerLost, TamperError, ReplayError, ProtocolError."""
        header, plain_header, message = self._receive_header(kinds, patience_s)
        tensor = None
        if header.dtype is not None:
            tensor = empty_like_header(header, pinned=device is not None and device.type == "cuda")
        if header.payload_bytes and tensor is not None:
            view = payload_view(tensor)
            if header.payload_bytes <= self._inline:
                self.post()
                sealed = payload_view(message)[self._header_end :][: len(view) + self._cipher.overhead]
                self._open(sealed, plain_header, view, header.kind.name)
            else:
                self._receive_chunks(header, plain_header, view)
        self._received += 1
        self._stats.frames_received += 1
        self._stats.payload_bytes_received += header.payload_bytes
        if tensor is not None and device is not None:
            tensor = tensor.to(device, non_blocking=True)
        return Frame(header=header, tensor=tensor)

    def _receive_header(self, kinds: tuple[Kind, ...], patience_s: float | None) -> tuple[Header, bytes, torch.Tensor]:
        """The header, its plain bytes, and the message, in which a small payload may follow."""
        self.post()
        assert self._first is not None
        (pending, message), wanted = self._first, " or ".join(kind.name for kind in kinds) or "a frame"
        start = time.perf_counter()
        pending.wait(self._timeout_s if patience_s is None else patience_s, wanted)
        self.heard = time.monotonic()
        self._stats.wait_s += time.perf_counter() - start
        self._first = None
        self._spare_firsts.append(message)

        view = payload_view(message)
        check_prefix(view[:PREFIX_BYTES], self._received)
        prefix, body = bytes(view[:PREFIX_BYTES]), bytearray(BODY_BYTES)
        self._open(view[PREFIX_BYTES : self._header_end], prefix, memoryview(body), "header")
        self._stats.wire_bytes_received += PREFIX_BYTES
        header = decode(bytes(body))
        if kinds and header.kind not in (*kinds, Kind.ERROR, Kind.ALIVE):
            raise ProtocolError(f"{self._transport.peer} sent {header.kind.name} where {wanted} was due")
        self._limits.check(header, peer=self._transport.peer)
        return header, prefix + body, message

    def _receive_chunks(self, header: Header, plain_header: bytes, view: memoryview) -> None:
        posted: deque[tuple[Pending, torch.Tensor]] = deque()
        count, step, ring = header.chunks, header.chunk_bytes, len(self._landing)
        for index in range(-_POSTED_CHUNKS, count):
            current = None
            if index >= 0:
                current = posted.popleft()
                self._await_chunk(current[0], header, index)
            if index + _POSTED_CHUNKS < count:
                start = (index + _POSTED_CHUNKS) * step
                size = min(step, len(view) - start) + self._cipher.overhead
                landing = self._landing_of(size, (index + _POSTED_CHUNKS) % ring)
                posted.append((self._transport.recv(landing), landing))
            elif index < count:
                self.post()
            if current is not None:
                part = view[index * step : (index + 1) * step]
                self._open(payload_view(current[1]), plain_header, part, self._chunk_name(header, index))

    def _await_chunk(self, pending: Pending, header: Header, index: int) -> None:
        start = time.perf_counter()
        pending.wait(self._timeout_s, self._chunk_name(header, index))
        self.heard = time.monotonic()
        self._stats.wire_s += time.perf_counter() - start

    def _landing_of(self, size: int, slot: int) -> torch.Tensor:
        """Memory for a sealed chunk; a slot comes round again only when its chunk has been opened."""
        if self._landing[slot].numel() < size:
            self._landing[slot] = torch.zeros(size, dtype=torch.uint8)
        return self._landing[slot][:size]

    def _open(self, sealed: memoryview, aad: bytes, out: memoryview, what: str) -> None:
        start = time.perf_counter()
        try:
            self._cipher.open_into(self._nonces.current(), sealed, aad, out)
        except TamperError as error:
            raise TamperError(f"frame {self._received} of {self._transport.peer}, {what}: {error}") from None
        self._nonces.advance()
        self._stats.open_s += time.perf_counter() - start
        self._stats.wire_bytes_received += len(sealed)

    @staticmethod
    def _chunk_name(header: Header, index: int) -> str:
        return f"{header.kind.name}, chunk {index + 1} of {header.chunks}"
