"""Frames over a transport, sealed: one end of a link.

The first message of a frame is its header, with a small payload right behind it; a larger payload follows in
chunks, and sealing, sending and opening overlap. Every seal takes the next nonce of its direction, so a piece that
comes again, too early, or in another's place does not open; the plain header is associated data of the whole frame.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from hpc.errors import LinkError, PeerLost
from hpc.link.cipher import Cipher
from hpc.link.frame import MAX_ERROR_BYTES, Frame, Header, Kind, payload_view
from hpc.link.incoming import Incoming
from hpc.link.limits import Limits
from hpc.link.outgoing import Outgoing
from hpc.link.stats import LinkStats
from hpc.link.transport import Transport, peer_words

__all__ = ["Channel", "LinkStats"]

_LAST_WORDS_S = 5.0  # longest wait for an error message, or the rest at `close`, to leave


class Channel:
    """Sends and receives frames. After a LinkError it is closed, and every later call says so.

    For one thread; or one that sends and one that receives (`read_elsewhere`).
    """

    def __init__(
        self,
        transport: Transport,
        *,
        send_cipher: Cipher,
        recv_cipher: Cipher,
        chunk_bytes: int,
        timeout_s: float,
        peer: str,
    ) -> None:
        """`timeout_s`: longest wait for the peer (seconds). The keys must be fresh: nonces begin at 0."""
        self.peer = peer
        self._sent_stats, self._received_stats = LinkStats(), LinkStats()  # apart: two threads may count
        self._read_elsewhere = False
        self.timeout_s = timeout_s
        self._transport, self._timeout_s = transport, timeout_s
        self._outgoing = Outgoing(
            transport, send_cipher, chunk_bytes=chunk_bytes, timeout_s=timeout_s, stats=self._sent_stats
        )
        self.limits = Limits()
        self._incoming = Incoming(
            transport, recv_cipher, timeout_s=timeout_s, stats=self._received_stats, limits=self.limits
        )
        self._closed: str | None = None
        self._peer_is_lost = False

    @property
    def stats(self) -> LinkStats:
        """Both directions so far."""
        return LinkStats.total((self._sent_stats, self._received_stats))

    @property
    def heard(self) -> float:
        """When the last piece of a frame came from the peer, ALIVE included (`time.monotonic`)."""
        return self._incoming.heard

    def read_elsewhere(self) -> None:
        """From now on a thread of its own receives, so `send` must not touch that direction."""
        self._read_elsewhere = True

    @contextlib.contextmanager
    def tapped(self, listener: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Meanwhile `listener` gets each sealed message (uint8) that this end hands to its transport, to be copied."""
        self._outgoing.tap = listener
        try:
            yield
        finally:
            self._outgoing.tap = None

    def send(self, header: Header, tensor: torch.Tensor | None = None) -> None:
        """Send a frame; dtype, shape and payload are the tensor's, which may be changed afterwards.

        May return before the last bytes have left. Raises ProtocolError for a header that does not fit (the
        channel stays open), PeerLost, NonceExhausted.
        """
        plain_header = self._outgoing.plain_header(header, tensor)
        with self._closing_on_error():
            if not self._read_elsewhere:
                self._incoming.post()  # so that the answer comes straight in
            self._outgoing.send(plain_header, memoryview(b"") if tensor is None else payload_view(_on_host(tensor)))

    def recv(self, *kinds: Kind, device: torch.device | None = None, patience_s: float | None = None) -> Frame:
        """The next frame, of one of `kinds` (none given: any), its tensor on `device` (default: CPU).

        `patience_s`: longest wait for it to begin (seconds; default: the channel's `timeout_s`). ALIVE frames, which
        only begin the wait anew, are passed over. Raises PeerLost (gone, silent, or stopped with an ERROR frame, whose
        text is shown), TamperError, ReplayError, ProtocolError.
        """
        with self._closing_on_error():
            while True:
                frame = self._incoming.recv(kinds, device, patience_s)
                if frame.header.kind is not Kind.ALIVE or Kind.ALIVE in kinds:
                    break
            if frame.header.kind is Kind.ERROR and Kind.ERROR not in kinds:
                raise PeerLost(f"{self.peer} stopped: {_words(frame)}")
        return frame

    def send_error(self, text: str, *, grace_s: float = _LAST_WORDS_S) -> None:
        """Tell the peer why this end stops, as well as it still goes within `grace_s`. Raises no LinkError."""
        words = torch.frombuffer(bytearray(text.encode()[:MAX_ERROR_BYTES] or b"?"), dtype=torch.uint8)
        with contextlib.suppress(LinkError):
            self.send(Header(kind=Kind.ERROR), words)
            self.flush(min(self._timeout_s, grace_s))

    def flush(self, timeout_s: float | None = None) -> None:
        """Wait until everything sent has left, `timeout_s` seconds at most (default: the channel's). PeerLost."""
        with self._closing_on_error():
            self._outgoing.flush(self._timeout_s if timeout_s is None else timeout_s)

    def close(self, *, grace_s: float = _LAST_WORDS_S) -> None:
        """Let what was sent leave (`grace_s` seconds at most), then give up the link. May be called again."""
        if self._closed is None:
            with contextlib.suppress(LinkError):
                self.flush(min(self._timeout_s, grace_s))
            self._close(self._closed or "closed by this end")

    def _close(self, why: str) -> None:
        self._closed = why
        self._transport.close()

    @contextlib.contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        if self._closed is not None:
            kind = PeerLost if self._peer_is_lost else LinkError
            raise kind(f"the channel to {self.peer} is closed: {self._closed}")
        try:
            yield
        except LinkError as error:
            self._peer_is_lost = isinstance(error, PeerLost)
            self._close(str(error))
            raise


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in CPU memory; pinned if it comes from a GPU, since that copy is faster."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach())


def _words(frame: Frame) -> str:
    return peer_words(b"" if frame.tensor is None else bytes(payload_view(frame.tensor)))
