"""A peer that announces too much is refused by what its header says, before memory is taken for it."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import Config, DataConfig, ModelConfig, TrainConfig
from hpc.errors import HandshakeError, ProtocolError
from hpc.link import frame, incoming
from hpc.link.channel import Channel
from hpc.link.conversation import Conversation
from hpc.link.frame import BODY_BYTES, MAX_PAYLOAD, Header, decode, encode, encode_prefix
from hpc.link.kinds import Kind
from hpc.link.limits import TOLD_BYTES, WIDEST, Limits
from hpc.link.transport import loopback_pair
from hpc.report.events import EventLog
from hpc.served import Served
from hpc.trunk_link import TrunkLink
from tests.loopback import channel_pair

BIGGEST = 2**40
# Where the fields of a header's body begin; see hpc.link.frame._FIXED.
ROWS_AT, SHAPE_AT, PAYLOAD_AT, CHUNK_AT, LAYOUT_AT = 6, 36, 68, 76, 84


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes of each tensor that the receiving end makes."""
    sizes: list[int] = []
    for name in ("empty", "zeros"):
        make = getattr(torch, name)

        def noted(*shape: Any, make: Callable[..., torch.Tensor] = make, **options: Any) -> torch.Tensor:
            made = make(*shape, **options)
            sizes.append(made.numel() * made.element_size())
            return made

        for module in (frame, incoming):
            monkeypatch.setattr(module.torch, name, noted)
    return sizes


def body(**fields: tuple[int, str, int]) -> bytes:
    """A body that no honest `encode` would give: field → (where, form, value)."""
    made = bytearray(
        encode(Header(kind=Kind.SMASHED, dtype=torch.uint8, shape=(4,), payload_bytes=4, chunk_bytes=1024))
    )
    for where, form, value in fields.values():
        struct.pack_into(form, made, where, value)
    return bytes(made)


def announce(channel: Channel, header: Header, tensor: torch.Tensor) -> None:
    """Send the header alone."""
    outgoing = channel._outgoing
    outgoing.send(outgoing.plain_header(header, tensor), memoryview(b""))


HUGE = {
    "2**40 bytes": body(shape=(SHAPE_AT, "<Q", BIGGEST), payload=(PAYLOAD_AT, "<Q", BIGGEST)),
    "2**64 - 1 bytes": body(payload=(PAYLOAD_AT, "<Q", 2**64 - 1)),
    "2**63 rows of a tensor": body(shape=(SHAPE_AT, "<Q", 2**63)),
    "all the rows that the field holds": body(rows=(ROWS_AT, "<H", 2**16 - 1)),
    "a layout as large as its field": body(layout=(LAYOUT_AT, "<H", 2**16 - 1)),
    "a chunk of 2**40 bytes": body(chunk=(CHUNK_AT, "<Q", BIGGEST)),
}


@pytest.mark.parametrize("what", HUGE)
def test_a_sealed_header_that_announces_too_much_takes_no_memory(what: str, allocated: list[int]) -> None:
    """The peer is authentic: its header opens. What it says is refused all the same."""
    client, server = channel_pair("on")
    allocated.clear()
    client._outgoing.send(encode_prefix(0) + HUGE[what], memoryview(b""))
    with pytest.raises(ProtocolError):
        server.recv()
    assert max(allocated, default=0) < 2**20, "only buffers of headers"


def test_the_offsets_are_those_of_the_header() -> None:
    assert decode(body()).payload_bytes == 4
    assert len(body()) == BODY_BYTES
    with pytest.raises(ProtocolError, match="number of rows: 65535"):
        decode(HUGE["all the rows that the field holds"])
    with pytest.raises(ProtocolError, match=f"shape \\({BIGGEST},\\).*exceeds {MAX_PAYLOAD} bytes"):
        decode(HUGE["2**40 bytes"])


@pytest.mark.parametrize(
    ("kind", "most"),
    [(Kind.BYE, 0), (Kind.ALIVE, 0), (Kind.PEER_KEY, 8192), (Kind.READY, TOLD_BYTES), (Kind.ERROR, 4096)],
)
def test_what_only_tells_something_is_small(kind: Kind, most: int, allocated: list[int]) -> None:
    client, server = channel_pair("on")
    announce(client, Header(kind=kind), torch.zeros(most + 1, dtype=torch.uint8))
    allocated.clear()
    with pytest.raises(ProtocolError, match=rf"announces {most + 1} bytes of {kind.name}; at most {most} are"):
        server.recv(Kind.SMASHED, kind)
    assert max(allocated, default=0) <= 2**17


def test_a_limit_is_the_last_that_fits() -> None:
    limits = Limits()
    limits.set((Kind.SMASHED,), 100)
    header = Header(kind=Kind.SMASHED, dtype=torch.uint8, shape=(100,), payload_bytes=100, chunk_bytes=1024)
    limits.check(header, peer="client 0")
    limits.raise_to((Kind.SMASHED,), 10)
    limits.check(header, peer="client 0")
    limits.set((Kind.SMASHED,), 99)
    with pytest.raises(ProtocolError, match="client 0 announces 100 bytes of SMASHED; at most 99"):
        limits.check(header, peer="client 0")


def served_by(channels: dict[int, Channel], folder: Path) -> Served:
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        data=DataConfig(max_source_length=20, max_target_length=4),
        train=TrainConfig(clients=2, per_client_batch_size=3),
    )
    return Served(
        config=config,
        channels=channels,
        device=torch.device("cpu"),
        hidden_size=64,
        dtype=torch.float32,
        log=EventLog(folder / "events.jsonl"),
    )


@pytest.mark.parametrize("kind", [Kind.SMASHED, Kind.GRAD_TRUNK_OUT, Kind.EVAL_SMASHED, Kind.PARTS])
def test_a_trunk_takes_no_more_than_the_batch_can_have(kind: Kind, tmp_path: Path, allocated: list[int]) -> None:
    """Hundreds of MiB from a client whose batch has some hundred KiB."""
    client, server = channel_pair("on")
    served_by({0: server}, tmp_path).expect_parts(1000)
    announce(client, Header(kind=kind, lengths=(1,)), torch.empty(2**25))
    allocated.clear()
    with pytest.raises(ProtocolError, match=f"announces {4 * 2**25} bytes of {kind.name}"):
        server.recv(kind)
    assert max(allocated, default=0) <= 2**17


def test_a_client_takes_back_no_more_than_it_sent_rows_for(allocated: list[int]) -> None:
    client, server = channel_pair("on")
    link = TrunkLink(client, client_id=0, device=torch.device("cpu"), reads_ahead=False)
    link.send_rows(Kind.SMASHED, 0, torch.zeros(2, 5, 8), [5, 3])
    server.recv(Kind.SMASHED)
    server.send(Header(kind=Kind.TRUNK_OUT), torch.zeros(8, 8))
    assert link.recv(Kind.TRUNK_OUT, 0).payload.shape == (8, 8)
    announce(server, Header(kind=Kind.TRUNK_OUT), torch.zeros(2**20))
    allocated.clear()
    with pytest.raises(ProtocolError, match=f"of TRUNK_OUT; at most {WIDEST * 8 * 8} are allowed"):
        link.recv(Kind.TRUNK_OUT, 0)
    assert max(allocated, default=0) <= 2**17


@pytest.mark.parametrize("announced", [2**40, 2**63 - 1, -1, 64 * 2**10 + 1])
def test_a_handshake_message_of_any_size_but_a_small_one_is_refused(announced: int, allocated: list[int]) -> None:
    """Nobody is authenticated yet at this point."""
    stranger, server = loopback_pair()
    stranger.send(torch.tensor([announced], dtype=torch.int64).view(torch.uint8))
    talk = Conversation(server, 2.0)
    with pytest.raises(HandshakeError, match=f"announces {announced} bytes"):
        talk.hear("hello", key=str)
    assert max(allocated, default=0) <= 2**17
