"""Headers survive the wire to the bit; whatever else comes is refused with ProtocolError."""

from __future__ import annotations

import contextlib
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import MAX_ROWS
from hpc.errors import ProtocolError, ReplayError, TamperError
from hpc.link import frame
from hpc.link.frame import BODY_BYTES, PREFIX_BYTES, Header, Kind, check_prefix, decode, describe, encode, encode_prefix

DTYPES = [dtype for dtype in frame._DTYPES if dtype is not None]
U16, U32 = st.integers(0, 2**16 - 1), st.integers(0, 2**32 - 1)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    dtype = draw(st.sampled_from([None, *DTYPES]))
    shape = tuple(draw(st.lists(st.integers(0, 50), max_size=4))) if dtype else ()
    size = math.prod(shape) * dtype.itemsize if dtype else 0
    lengths = tuple(draw(st.lists(U16, max_size=MAX_ROWS)))
    described = 3 * len(lengths) <= MAX_ROWS and draw(st.booleans())
    return Header(
        kind=draw(st.sampled_from(Kind)),
        round=draw(U32),
        step=draw(U32),
        micro=draw(U32),
        flags=draw(U16),
        weight=draw(st.floats()),
        square_sum=draw(st.floats()),
        lengths=lengths,
        layout=tuple(draw(st.lists(U16, min_size=2 * len(lengths), max_size=2 * len(lengths)))) if described else (),
        dtype=dtype,
        shape=shape,
        payload_bytes=size,
        chunk_bytes=draw(st.integers(frame.MIN_CHUNK, frame.MAX_CHUNK)) if size else 0,
    )


@given(headers())
def test_round_trip_to_the_bit(header: Header) -> None:
    body = encode(header)
    assert len(body) == BODY_BYTES
    assert encode(decode(body)) == body  # bytes, not values: NaN differs from itself
    assert str(decode(body)) == str(header)


@given(st.binary(min_size=0, max_size=2 * BODY_BYTES) | st.binary(min_size=BODY_BYTES, max_size=BODY_BYTES))
def test_random_bytes_raise_only_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(headers(), st.lists(st.tuples(st.integers(0, BODY_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_headers_raise_or_stay_allocatable(header: Header, changes: list[tuple[int, int]]) -> None:
    body = bytearray(encode(header))
    for position, value in changes:
        body[position] = value
    try:
        changed = decode(bytes(body))
    except ProtocolError:
        return
    if changed.dtype is not None and changed.payload_bytes < 2**20:
        tensor = frame.empty_like_header(changed)
        assert len(frame.payload_view(tensor)) == changed.payload_bytes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5, 7), (2, 3, 4, 5)], ids=str)
def test_payload_is_the_tensors_own_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.float32).to(dtype)
    view = frame.payload_view(tensor)
    header = describe(Header(kind=Kind.SMASHED), tensor, 4096)
    assert len(view) == header.payload_bytes == tensor.numel() * dtype.itemsize
    if len(view):
        view[0] = 1
        assert tensor.view(-1)[:1].view(torch.uint8)[0] == 1
    twin = frame.empty_like_header(decode(encode(header)))
    frame.payload_view(twin)[:] = view
    assert twin.dtype == dtype
    assert twin.shape == tensor.shape
    assert bytes(frame.payload_view(twin)) == bytes(view)


def test_transposed_tensor_is_copied_in_order() -> None:
    tensor = torch.arange(6).view(2, 3).t()
    assert bytes(frame.payload_view(tensor)) == bytes(frame.payload_view(tensor.contiguous()))


def test_gradient_carrying_tensor_can_be_viewed() -> None:
    assert len(frame.payload_view(torch.ones(3, requires_grad=True))) == 12


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("lengths", (1,) * (MAX_ROWS + 1), "193 row lengths"),
        ("lengths", (65536,), "65536"),
        ("step", -1, "-1"),
        ("flags", 2**16, "65536"),
        ("payload_bytes", 5, "5 bytes"),
        ("chunk_bytes", 4096, "chunks of 4096"),
    ],
)
def test_encode_names_a_value_that_does_not_fit(field: str, value: object, named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        encode(Header(**{"kind": Kind.STEP, field: value}))  # type: ignore[arg-type]


def test_unknown_dtype_and_five_dimensions_are_refused() -> None:
    with pytest.raises(ProtocolError, match="complex64"):
        encode(describe(Header(kind=Kind.STEP), torch.zeros(1, dtype=torch.complex64), 4096))
    with pytest.raises(ProtocolError, match="dimensions"):
        encode(describe(Header(kind=Kind.STEP), torch.zeros(1, 1, 1, 1, 1), 4096))


@pytest.mark.parametrize(
    ("offset", "code", "value", "named"),
    [
        (0, "<H", 999, "kind: 999"),
        (4, "<B", 200, "dtype code: 200"),
        (5, "<B", 5, "dimensions: 5"),
        (6, "<H", 193, "rows: 193"),
        (36, "<Q", 2**62, "exceeds"),
        (68, "<Q", 2**40, "announces 1099511627776 bytes"),
        (76, "<Q", 1, "chunks of 1 bytes"),
        (BODY_BYTES - 1, "<B", 1, "zeros"),
    ],
)
def test_decode_names_the_impossible_value(offset: int, code: str, value: int, named: str) -> None:
    body = bytearray(encode(describe(Header(kind=Kind.SMASHED, lengths=(1,)), torch.zeros(2, 3), 4096)))
    struct.pack_into(code, body, offset, value)
    with pytest.raises(ProtocolError, match=named):
        decode(bytes(body))


def test_empty_tensor_with_a_huge_dimension_is_refused() -> None:
    body = bytearray(encode(describe(Header(kind=Kind.SMASHED), torch.zeros(0, 3), 4096)))
    struct.pack_into("<Q", body, 44, 2**60)
    with pytest.raises(ProtocolError, match="exceeds"):
        decode(bytes(body))


def test_prefix_tells_replay_gap_and_noise_apart() -> None:
    check_prefix(encode_prefix(7), 7)
    with pytest.raises(ReplayError, match="frame 6 was here before; frame 7"):
        check_prefix(encode_prefix(6), 7)
    with pytest.raises(ReplayError, match=r"frame 9 came too early.*frame 7"):
        check_prefix(encode_prefix(9), 7)
    with pytest.raises(TamperError, match="frame 7"):
        check_prefix(b"x" * PREFIX_BYTES, 7)


def test_header_without_tensor_allocates_nothing() -> None:
    with pytest.raises(ProtocolError, match="BYE came without a tensor"):
        frame.empty_like_header(Header(kind=Kind.BYE))


@pytest.mark.parametrize(
    ("lengths", "layout", "message"),
    [((3, 2), (1, 2), "a layout of 2 numbers for 2 rows"), ((1,) * 65, (0,) * 130, "65 rows .* holds 64 such")],
)
def test_a_layout_that_does_not_fit_its_rows_is_refused(
    lengths: tuple[int, ...], layout: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ProtocolError, match=message):
        encode(Header(kind=Kind.SMASHED, lengths=lengths, layout=layout))
