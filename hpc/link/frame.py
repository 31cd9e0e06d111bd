"""Frames: what crosses a link, as bytes. A header of fixed size, then the tensor's own memory.

A header on the wire is a clear prefix (magic, version, sequence number), the sealed body and the cipher's tag:
512 bytes with AES-GCM. The payload travels in chunks, or right behind the header if it is small
(`hpc.link.channel`). Little-endian throughout; nothing is pickled.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace

import torch

from hpc.config import MAX_ROWS
from hpc.errors import ProtocolError, ReplayError, TamperError
from hpc.link.kinds import Kind

MAX_PAYLOAD = 8 * 2**30  # bytes; an authentic but mistaken peer must not make this end allocate without bound
MIN_CHUNK = 1024  # bytes; smaller ones would only cost
MAX_CHUNK = 2**30  # bytes; with its tag still below MPI's 32-bit counts
MAX_DIMS = 4
MAX_ERROR_BYTES = 4096  # text of an ERROR frame
INLINE_BYTES = 64 * 2**10  # a payload up to this size travels with its header: one message instead of two

_PREFIX = struct.Struct("<4sHHQ")
_MAGIC, _VERSION = b"hpcL", 2
# kind, flags, dtype, dimensions, rows, round, step, micro, weight, square_sum, shape, payload_bytes, chunk_bytes,
# numbers of the layout
_FIXED = struct.Struct(f"<HHBBHIIIdd{MAX_DIMS}QQQH")
_PADDING = 10  # room for a later field

PREFIX_BYTES = _PREFIX.size
BODY_BYTES = _FIXED.size + 2 * MAX_ROWS + _PADDING

# The position is the code on the wire: append only.
_DTYPES: tuple[torch.dtype | None, ...] = (
    None,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


@dataclass(kw_only=True, frozen=True)
class Header:
    """What a frame says about itself. `Channel.send` fills the last four from the tensor."""

    kind: Kind
    round: int = 0
    step: int = 0
    micro: int = 0
    flags: int = 0
    """Meaning depends on the kind (16 bits)."""
    weight: float = 0.0
    """Label tokens, the weight of a mean loss."""
    square_sum: float = 0.0
    """Partial sum of squared gradients, or a norm."""
    lengths: tuple[int, ...] = ()
    """Valid tokens of each row, instead of an attention mask; at most MAX_ROWS rows, each below 65536."""
    layout: tuple[int, ...] = ()
    """Two integers for each row where positions depend on token ids (`hpc.model.chatglm.layout`), row after row; else
    empty. They take the room of row lengths: at most MAX_ROWS of both together."""
    dtype: torch.dtype | None = None
    """None: no tensor."""
    shape: tuple[int, ...] = ()
    payload_bytes: int = 0
    chunk_bytes: int = 0
    """Plain bytes of a chunk (the last may be shorter); 0 without a payload."""

    @property
    def chunks(self) -> int:
        return -(-self.payload_bytes // self.chunk_bytes) if self.payload_bytes else 0


@dataclass(kw_only=True, frozen=True)
class Frame:
    """A received header and its tensor, if it had one."""

    header: Header
    tensor: torch.Tensor | None = None

    @property
    def payload(self) -> torch.Tensor:
        """The tensor. Raises ProtocolError if the frame came without one."""
        if self.tensor is None:
            raise ProtocolError(f"{self.header.kind.name} came without a tensor")
        return self.tensor


LOSS_NOT_FINITE = 1  # flag of GRAD_TRUNK_OUT: all that is told about a loss
SPENT = 2  # flag of PART_GRADS: the client's privacy budget does not allow what comes next
LEFT_OUT = 1  # flag of STEP: nobody steps, and it is nobody's fault
WOULD_STOP = 1  # flag of VOTE and VERDICT
DONATES = 1  # flag of WELCOME: whoever gets it gives what it has learned to the one that comes
NEEDS_STATE = 1  # flag of a client's first READY: it may lack what the clients have learned up to now
HAS_START = 2  # another: it has what they had learned where this attempt of the run begins
NOT_WRITTEN = 1  # flag of READY after a save: this client's file of the checkpoint could not be written


def describe(header: Header, tensor: torch.Tensor | None, chunk_bytes: int) -> Header:
    """The header with dtype, shape, payload and chunk size of `tensor`."""
    if tensor is None:
        return replace(header, dtype=None, shape=(), payload_bytes=0, chunk_bytes=0)
    size = tensor.numel() * tensor.element_size()
    shape, chunk = tuple(tensor.shape), chunk_bytes if size else 0
    return replace(header, dtype=tensor.dtype, shape=shape, payload_bytes=size, chunk_bytes=chunk)


def encode_prefix(number: int) -> bytes:
    """The clear prefix of the frame with this sequence number: PREFIX_BYTES bytes."""
    return _PREFIX.pack(_MAGIC, _VERSION, 0, number)


def check_prefix(prefix: bytes | memoryview, expected: int) -> None:
    """Accept only the frame that is due. Raises TamperError (not a frame) or ReplayError (again, or out of order).

    Nothing here is authentic yet; the prefix is associated data of the header's seal, which settles it.
    """
    magic, version, _, number = _PREFIX.unpack(prefix)
    if magic != _MAGIC or version != _VERSION:
        raise TamperError(f"frame {expected} begins with {magic!r} version {version}, not {_MAGIC!r} {_VERSION}")
    if number != expected:
        how = "was here before" if number < expected else "came too early: frames are missing"
        raise ReplayError(f"frame {number} {how}; frame {expected} was due")


def encode(header: Header) -> bytes:
    """The body: BODY_BYTES bytes. Raises ProtocolError naming a value that does not fit."""
    _check(header)
    shape = (*header.shape, *(0,) * (MAX_DIMS - len(header.shape)))
    rows, layout = len(header.lengths), len(header.layout)
    try:
        fixed = _FIXED.pack(
            header.kind,
            header.flags,
            _CODES[header.dtype],
            len(header.shape),
            rows,
            header.round,
            header.step,
            header.micro,
            header.weight,
            header.square_sum,
            *shape,
            header.payload_bytes,
            header.chunk_bytes,
            layout,
        )
        return (fixed + struct.pack(f"<{rows + layout}H", *header.lengths, *header.layout)).ljust(BODY_BYTES, b"\0")
    except struct.error as error:
        raise ProtocolError(f"{header} has a value that does not fit into its field: {error}") from None


def decode(body: bytes | memoryview) -> Header:
    """The header in BODY_BYTES bytes; every value is checked, so a tensor may be allocated from it.

    Raises ProtocolError naming the value, and nothing else whatever the bytes are.
    """
    if len(body) != BODY_BYTES:
        raise ProtocolError(f"header of {len(body)} bytes; it must have {BODY_BYTES}")
    kind, flags, code, dims, rows, round_, step, micro, weight, square_sum, *rest = _FIXED.unpack_from(body)
    shape, (payload_bytes, chunk_bytes, layout) = tuple(rest[:MAX_DIMS]), rest[MAX_DIMS:]
    for name, value, known in (
        ("kind", kind, kind in Kind._value2member_map_),
        ("dtype code", code, code < len(_DTYPES)),
        ("number of dimensions", dims, dims <= MAX_DIMS),
        ("number of rows", rows, rows <= MAX_ROWS),
        ("size of the layout", layout, layout in (0, 2 * rows) and rows + layout <= MAX_ROWS),
        ("shape", shape, not any(shape[dims:])),
    ):
        if not known:
            raise ProtocolError(f"header names an impossible {name}: {value}")
    numbers = struct.unpack_from(f"<{rows + layout}H", body, _FIXED.size)
    end = _FIXED.size + 2 * len(numbers)
    if bytes(body[end:]).strip(b"\0"):
        raise ProtocolError("header has values behind what it says of its rows, where zeros belong")
    header = Header(
        kind=Kind(kind),
        round=round_,
        step=step,
        micro=micro,
        flags=flags,
        weight=weight,
        square_sum=square_sum,
        lengths=numbers[:rows],
        layout=numbers[rows:],
        dtype=_DTYPES[code],
        shape=shape[:dims],
        payload_bytes=payload_bytes,
        chunk_bytes=chunk_bytes,
    )
    _check(header)
    return header


def _check(header: Header) -> None:
    """Rules that hold on both ends. Raises ProtocolError."""
    name = header.kind.name
    if len(header.lengths) > MAX_ROWS:
        raise ProtocolError(f"{name} has {len(header.lengths)} row lengths; a header holds {MAX_ROWS}")
    if len(header.layout) not in (0, 2 * len(header.lengths)):
        raise ProtocolError(f"{name} has a layout of {len(header.layout)} numbers for {len(header.lengths)} rows")
    if len(header.lengths) + len(header.layout) > MAX_ROWS:
        raise ProtocolError(
            f"{name} describes {len(header.lengths)} rows by three numbers each; a header holds {MAX_ROWS // 3} such"
        )
    if header.dtype not in _CODES:
        raise ProtocolError(f"{name} has dtype {header.dtype}, which no frame carries")
    if len(header.shape) > MAX_DIMS:
        raise ProtocolError(f"{name} has shape {header.shape}; a frame carries at most {MAX_DIMS} dimensions")
    item = header.dtype.itemsize if header.dtype is not None else 0
    # Zeros count as ones: the strides of an empty tensor must not overflow either.
    if item * math.prod(max(size, 1) for size in header.shape) > MAX_PAYLOAD:
        raise ProtocolError(f"{name} of shape {header.shape} and {header.dtype} exceeds {MAX_PAYLOAD} bytes")
    due = item * math.prod(header.shape)
    if header.payload_bytes != due or (item == 0 and header.shape):
        raise ProtocolError(
            f"{name} announces {header.payload_bytes} bytes; shape {header.shape} of {header.dtype} takes {due}"
        )
    sane = MIN_CHUNK <= header.chunk_bytes <= MAX_CHUNK if header.payload_bytes else header.chunk_bytes == 0
    if not sane:
        raise ProtocolError(
            f"{name} has chunks of {header.chunk_bytes} bytes; {MIN_CHUNK} to {MAX_CHUNK} are allowed, 0 when empty"
        )


def payload_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a CPU tensor of any dtype and shape; no copy if it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def empty_like_header(header: Header, *, pinned: bool = False) -> torch.Tensor:
    """Uninitialised CPU memory for the header's payload. Raises ProtocolError if it announces no tensor."""
    if header.dtype is None:
        raise ProtocolError(f"{header.kind.name} came without a tensor")
    return torch.empty(header.shape, dtype=header.dtype, pin_memory=pinned)
