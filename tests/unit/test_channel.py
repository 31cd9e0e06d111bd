"""A channel delivers what was sent, hides it, and closes on anything that was altered, repeated, moved or cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from hpc.errors import LinkError, PeerLost, ProtocolError, ReplayError, TamperError
from hpc.link.channel import Channel
from hpc.link.cipher import Cipher, PlainCipher, make_cipher
from hpc.link.frame import BODY_BYTES, INLINE_BYTES, PREFIX_BYTES, Frame, Header, Kind
from hpc.link.stats import LinkStats
from hpc.link.transport import LoopbackTransport, Pending, loopback_pair

KEYS = (bytes(range(32)), bytes(range(32, 64)))
CHUNK = 4096
HEADER_BYTES = PREFIX_BYTES + BODY_BYTES + 16
LARGE = INLINE_BYTES + 3 * CHUNK + 17  # bytes: too large to travel with the header, and a last chunk that is not full
MESSAGES = 1 + -(-LARGE // CHUNK)

Change = Callable[[list[bytes]], list[bytes]]


class Tap:
    """Records the messages sent, and may replace what is delivered of each frame's messages."""

    short_messages = True
    name = "tap"

    def __init__(self, inner: LoopbackTransport, change: Change | None = None, gather: int = 1) -> None:
        self.inner, self.peer, self.change, self.gather = inner, inner.peer, change, gather
        self.seen: list[bytes] = []
        self._held: list[bytes] = []

    def send(self, buffer: torch.Tensor) -> Pending:
        data = bytes(buffer.numpy())
        self.seen.append(data)
        if self.change is None:
            return self.inner.send(buffer)
        self._held.append(data)
        if len(self._held) == self.gather:
            for message in self.change(self._held):
                self.inner.send(torch.frombuffer(bytearray(message), dtype=torch.uint8))
            self._held = []
        return Gone()

    def recv(self, buffer: torch.Tensor) -> Pending:
        return self.inner.recv(buffer)

    def close(self) -> None:
        self.inner.close()


class Gone:
    def wait(self, timeout_s: float, what: str = "") -> None:
        """The tap has it; the sender need not wait."""


def pair(
    change: Change | None = None,
    *,
    gather: int = 1,
    libraries: tuple[str, str] = ("openssl", "openssl"),
    chunk: int = CHUNK,
    timeout_s: float = 5.0,
) -> tuple[Channel, Channel, Tap]:
    here, there = loopback_pair()
    tap = Tap(here, change, gather)

    def end(transport: Tap | LoopbackTransport, library: str, send: bytes, recv: bytes, peer: str) -> Channel:
        ciphers: list[Cipher] = [PlainCipher(), PlainCipher()]
        if library != "off":
            ciphers = [make_cipher(library, send), make_cipher(library, recv)]
        return Channel(
            transport, send_cipher=ciphers[0], recv_cipher=ciphers[1], chunk_bytes=chunk, timeout_s=timeout_s, peer=peer
        )

    return end(tap, libraries[0], *KEYS, "server"), end(there, libraries[1], *KEYS[::-1], "client"), tap


@contextmanager
def meanwhile(work: Callable[[], object]) -> Iterator[None]:
    """Run `work` in a thread beside the block; a LinkError in it is expected when the block breaks the link."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except LinkError:
            pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    yield
    thread.join(10)
    assert not thread.is_alive()
    assert not errors


def carry(sender: Channel, receiver: Channel, *frames: tuple[Header, torch.Tensor | None]) -> list[Frame]:
    def send_all() -> None:
        for header, tensor in frames:
            sender.send(header, tensor)
        sender.flush()

    with meanwhile(send_all):
        return [receiver.recv() for _ in frames]


def noise(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("libraries", [("openssl", "openssl"), ("pycryptodome", "openssl"), ("off", "off")], ids=str)
@pytest.mark.parametrize(
    "size", [0, 1, CHUNK, INLINE_BYTES, INLINE_BYTES + 1, LARGE, 40 * CHUNK, 5_000_000], ids=lambda n: f"{n}B"
)
def test_any_size_arrives(size: int, libraries: tuple[str, str]) -> None:
    client, server, _ = pair(libraries=libraries, chunk=CHUNK if size < 10**6 else 2**20)
    (frame,) = carry(client, server, (Header(kind=Kind.SMASHED, step=7, lengths=(3, 1), weight=0.1), noise(size)))
    assert frame.tensor is not None
    assert torch.equal(frame.tensor, noise(size))
    assert (frame.header.kind, frame.header.step, frame.header.lengths) == (Kind.SMASHED, 7, (3, 1))
    assert frame.header.weight == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64])
def test_dtype_and_shape_arrive(dtype: torch.dtype) -> None:
    client, server, _ = pair()
    tensor = torch.arange(24).view(2, 3, 4).to(dtype)
    (frame,) = carry(client, server, (Header(kind=Kind.TRUNK_OUT), tensor))
    assert frame.tensor is not None
    assert frame.tensor.dtype == dtype
    assert torch.equal(frame.tensor.float(), tensor.float())


def test_no_tensor_and_empty_tensor_differ() -> None:
    client, server, _ = pair()
    frames = carry(client, server, (Header(kind=Kind.BYE), None), (Header(kind=Kind.READY), torch.zeros(0, 3)))
    assert frames[0].tensor is None
    assert frames[1].tensor is not None
    assert frames[1].tensor.shape == (0, 3)


def test_both_directions_in_turn_and_many_frames() -> None:
    client, server, _ = pair()

    def echo() -> None:
        for _ in range(50):
            frame = server.recv(Kind.SMASHED)
            server.send(Header(kind=Kind.TRUNK_OUT, step=frame.header.step), frame.tensor)
        server.flush()

    with meanwhile(echo):
        for step in range(50):
            sent = noise(3000 * step)
            client.send(Header(kind=Kind.SMASHED, step=step), sent)
            answer = client.recv(Kind.TRUNK_OUT)
            assert answer.header.step == step
            assert answer.tensor is not None
            assert torch.equal(answer.tensor, sent)


@pytest.mark.parametrize("size", [100, LARGE])
def test_sender_may_change_the_tensor_while_it_is_in_flight(size: int) -> None:
    """The loopback reads a message only when it is taken, so a buffer used again too early would show."""
    client, server, _ = pair()
    tensor = noise(size)
    for _ in range(3):
        client.send(Header(kind=Kind.SMASHED), tensor)
        tensor.zero_()
        tensor.copy_(noise(size))
    tensor.zero_()
    for _ in range(3):
        received = server.recv(Kind.SMASHED).tensor
        assert received is not None
        assert torch.equal(received, noise(size))


@pytest.mark.parametrize("size", [1000, LARGE])
def test_the_wire_shows_nothing_of_the_tensor(size: int) -> None:
    client, server, tap = pair()
    carry(client, server, (Header(kind=Kind.SMASHED, lengths=(12345,)), torch.full((size,), 65, dtype=torch.uint8)))
    wire = b"".join(tap.seen)
    assert b"A" * 8 not in wire
    assert (12345).to_bytes(2, "little") + bytes(100) not in wire


def test_plain_cipher_shows_it() -> None:
    client, server, tap = pair(libraries=("off", "off"))
    carry(client, server, (Header(kind=Kind.SMASHED), torch.full((1000,), 65, dtype=torch.uint8)))
    assert b"A" * 1000 in b"".join(tap.seen)


@pytest.mark.parametrize("size", [0, 1, CHUNK, LARGE, 100 * CHUNK])
def test_overhead_is_a_kibibyte_and_32_bytes_a_chunk_at_most(size: int) -> None:
    client, server, tap = pair()
    carry(client, server, (Header(kind=Kind.SMASHED), noise(size)))
    wire = sum(map(len, tap.seen))
    assert wire < size + 1024 + 32 * -(-size // CHUNK)
    assert client.stats.wire_bytes_sent == wire == server.stats.wire_bytes_received
    assert client.stats.payload_bytes_sent == size == server.stats.payload_bytes_received


def flip(message: int, position: int) -> Change:
    def change(messages: list[bytes]) -> list[bytes]:
        altered = bytearray(messages[message])
        altered[position] ^= 0x40
        return [*messages[:message], bytes(altered), *messages[message + 1 :]]

    return change


def refused(change: Change, error: type[LinkError], text: str, *, size: int = LARGE) -> None:
    """Send one frame through `change`; the receiver must raise and stay closed."""
    client, server, _ = pair(change, gather=MESSAGES if size == LARGE else 1, timeout_s=1.0)
    client.send(Header(kind=Kind.SMASHED), noise(size))
    with pytest.raises(error, match=text):
        server.recv(Kind.SMASHED)
    with pytest.raises(LinkError, match=f"channel to client is closed: .*{text}"):
        server.recv(Kind.SMASHED)
    with pytest.raises(LinkError, match="closed"):
        server.send(Header(kind=Kind.BYE))


@pytest.mark.parametrize(
    ("position", "error", "text"),
    [
        (0, TamperError, "frame 0 begins with"),
        (4, TamperError, "frame 0 begins with"),
        (6, TamperError, "frame 0 of client, header"),
        (8, ReplayError, "frame 64 came too early.*frame 0 was due"),
        (PREFIX_BYTES, TamperError, "header"),
        (PREFIX_BYTES + 300, TamperError, "header"),
        (HEADER_BYTES - 1, TamperError, "header"),
    ],
)
def test_flip_in_the_header(position: int, error: type[LinkError], text: str) -> None:
    refused(flip(0, position), error, text)


@pytest.mark.parametrize("position", [HEADER_BYTES, HEADER_BYTES + 50, -1])
def test_flip_in_a_payload_behind_the_header(position: int) -> None:
    refused(flip(0, position), TamperError, "frame 0 of client, SMASHED", size=100)


@pytest.mark.parametrize("message", [1, 2, MESSAGES - 1])
@pytest.mark.parametrize("position", [0, -1])
def test_flip_in_a_chunk_names_it(message: int, position: int) -> None:
    refused(flip(message, position), TamperError, f"SMASHED, chunk {message} of {MESSAGES - 1}")


def test_swapped_repeated_and_missing_chunks() -> None:
    refused(lambda m: [m[0], m[2], m[1], *m[3:]], TamperError, "chunk 1")
    refused(lambda m: [m[0], m[1], m[1], *m[2:]], TamperError, "chunk 2")
    refused(lambda m: [m[0], *m[2:]], TamperError, "chunk 1")


def test_truncated_messages() -> None:
    refused(lambda m: [m[0][:100], *m[1:]], TamperError, "header")
    refused(lambda m: [m[0], m[1][:-1], *m[2:]], TamperError, "chunk 1")
    refused(lambda m: [m[0][:-30]], TamperError, "SMASHED", size=100)


def test_dropped_frame_end_is_a_lost_peer_in_time() -> None:
    refused(lambda m: m[:-1], PeerLost, f"1.0 s of waiting for SMASHED, chunk {MESSAGES - 1} of")


def test_repeated_frame_is_a_replay() -> None:
    client, server, _ = pair(lambda messages: messages * 2)
    client.send(Header(kind=Kind.SMASHED), noise(10))
    server.recv(Kind.SMASHED)
    with pytest.raises(ReplayError, match="frame 0 was here before; frame 1 was due"):
        server.recv(Kind.SMASHED)


def test_replay_under_a_fresh_number_does_not_open() -> None:
    def renumbered(messages: list[bytes]) -> list[bytes]:
        again = messages[0][:8] + (1).to_bytes(8, "little") + messages[0][16:]
        return [messages[0], again]

    client, server, _ = pair(renumbered)
    client.send(Header(kind=Kind.SMASHED), noise(10))
    server.recv(Kind.SMASHED)
    with pytest.raises(TamperError, match="frame 1"):
        server.recv(Kind.SMASHED)


def test_swapped_frames_are_out_of_order() -> None:
    client, server, _ = pair(lambda messages: messages[::-1], gather=2)
    client.send(Header(kind=Kind.SMASHED), noise(10))
    client.send(Header(kind=Kind.SMASHED), noise(10))
    with pytest.raises(ReplayError, match=r"frame 1 came too early.*frame 0 was due"):
        server.recv(Kind.SMASHED)


def test_reflected_frame_does_not_open() -> None:
    """Each direction has its own key, so a frame sent back to its sender is not taken for an answer."""
    client, _, tap = pair()
    client.send(Header(kind=Kind.SMASHED), noise(10))
    here, there = loopback_pair()
    mirror = Channel(
        there,
        send_cipher=make_cipher("openssl", KEYS[0]),
        recv_cipher=make_cipher("openssl", KEYS[1]),
        chunk_bytes=CHUNK,
        timeout_s=1.0,
        peer="server",
    )
    here.send(torch.frombuffer(bytearray(tap.seen[0]), dtype=torch.uint8))
    with pytest.raises(TamperError):
        mirror.recv()


def test_unexpected_kind_names_both() -> None:
    client, server, _ = pair()
    client.send(Header(kind=Kind.STEP))
    with pytest.raises(ProtocolError, match="STEP where SMASHED or EVAL_SMASHED was due"):
        server.recv(Kind.SMASHED, Kind.EVAL_SMASHED)


def test_header_that_does_not_fit_leaves_the_channel_open() -> None:
    client, server, _ = pair()
    with pytest.raises(ProtocolError, match="193"):
        client.send(Header(kind=Kind.SMASHED, lengths=(1,) * 193))
    assert carry(client, server, (Header(kind=Kind.BYE), None))[0].header.kind is Kind.BYE


def test_errors_words_reach_the_peer_in_one_line() -> None:
    client, server, _ = pair()
    with (
        meanwhile(lambda: client.send_error("disk full\n\x1b[2J")),
        pytest.raises(PeerLost, match=r"^client stopped: disk full  \[2J$"),
    ):
        server.recv(Kind.SMASHED)


def test_long_error_text_is_cut() -> None:
    client, server, _ = pair()
    with meanwhile(lambda: client.send_error("é" * 10_000)), pytest.raises(PeerLost, match=r"é{400}…$"):
        server.recv()


def test_send_error_on_a_closed_channel_is_quiet() -> None:
    client, _, _ = pair()
    client.close()
    client.send_error("too late")
    client.close()


def test_silent_peer_is_named_with_what_was_due() -> None:
    _, server, _ = pair(timeout_s=0.1)
    with pytest.raises(PeerLost, match=r"client: silent after 0\.1 s of waiting for GRAD_TRUNK_OUT"):
        server.recv(Kind.GRAD_TRUNK_OUT)


def test_closed_peer_is_noticed() -> None:
    client, server, _ = pair()
    client.close()
    with pytest.raises(PeerLost, match="client: closed the link"):
        server.recv()


def test_stats_differ_and_add_up() -> None:
    client, server, _ = pair()
    before = client.stats.snapshot()
    carry(client, server, (Header(kind=Kind.SMASHED), noise(LARGE)), (Header(kind=Kind.BYE), None))
    spent = before.until(client.stats)
    assert (spent.frames_sent, spent.payload_bytes_sent, before.frames_sent) == (2, LARGE, 0)
    assert spent.seal_s > 0
    assert server.stats.open_s > 0
    total = LinkStats.total([spent, server.stats])
    assert (total.frames_sent, total.frames_received) == (2, 2)
