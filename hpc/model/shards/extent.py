"""Tensors that lie in a file as plain values: where, and how they come into memory.

A tensor in the asked dtype is mapped, not read: its pages become resident when they are first used, are shared by the
processes of a machine that use the same file, and count as `RssFile`, once. Writing to them copies the page and
leaves the file alone. Only the stretches of the file that hold such tensors are mapped, so a machine with less
memory than the shard is large still may.

A tensor in another dtype is read and converted piece by piece into memory of its own, and no page of the file is
mapped for it. So a part never costs more than the bytes that it owns plus one piece.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc.errors import ModelError

# Larger pieces were no faster, and leave holes of their size in the heap.
PIECE_BYTES = 2**20
# Values that mean what they say. Others (float8, packed integers) are nothing without scales kept elsewhere.
PLAIN_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Neighbours closer than this share a mapping: each mapping holds a file descriptor.
GAP_BYTES = 2**20


@dataclass(kw_only=True, frozen=True)
class Extent:
    """A tensor's values from byte `start` of the file; `stride` in elements, as torch has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def elements(self) -> int:
        """Elements from the first to the last one, with what a stride skips."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def end(self) -> int:
        return self.start + self.elements * self.dtype.itemsize

    def shaped(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor of these values, contiguous."""
        return flat.as_strided(self.shape, self.stride).contiguous()

    def mappable(self, dtype: torch.dtype) -> bool:
        """Whether the bytes in the file can serve as they are."""
        wanted = self.dtype == dtype or not self.dtype.is_floating_point
        return wanted and self.start % self.dtype.itemsize == 0 and self.elements > 0


def foreign_dtype(path: Path, key: str, name: str) -> ModelError:
    """The refusal of a tensor whose dtype is none of `PLAIN_DTYPES`."""
    return ModelError(
        f"{key} in {path.name} is stored as {name}, which cannot be converted without its scales; "
        f"give a checkpoint in one of {', '.join(PLAIN_DTYPES)}"
    )


def read_extents(path: Path, extents: Mapping[str, Extent], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Each extent as a tensor, in `dtype` where it is floating point. Raises `ModelError` if the file ends early."""
    mapped = _apart({key: extent for key, extent in extents.items() if extent.mappable(dtype)})
    with path.open("rb", buffering=0) as file:
        size = path.stat().st_size
        short = [key for key, extent in extents.items() if extent.end > size]
        if short:
            raise ModelError(f"{path.name} ends at byte {size}, inside {short[0]}: it is truncated; fetch it again")
        tensors: dict[str, torch.Tensor] = {}
        for run in runs(mapped.values()):
            tensors |= _map(file.fileno(), run, {k: e for k, e in mapped.items() if e.start in run})
        for key, extent in extents.items():
            if key not in mapped:
                tensors[key] = _convert(file, extent, dtype if extent.dtype.is_floating_point else extent.dtype)
    return tensors


def _apart(extents: Mapping[str, Extent]) -> dict[str, Extent]:
    """Those that overlap no earlier one: two parameters that share memory would learn as one."""
    kept: dict[str, Extent] = {}
    end = 0
    for key, extent in sorted(extents.items(), key=lambda item: item[1].start):
        if extent.start >= end:
            kept[key], end = extent, extent.end
    return kept


def runs(extents: Iterable[Extent]) -> list[range]:
    """The stretches of the file (byte ranges) that cover the extents, without gaps above `GAP_BYTES`."""
    found: list[range] = []
    for extent in sorted(extents, key=lambda extent: extent.start):
        if found and extent.start - found[-1].stop <= GAP_BYTES:
            found[-1] = range(found[-1].start, max(found[-1].stop, extent.end))
        else:
            found.append(range(extent.start, extent.end))
    return found


def _map(descriptor: int, run: range, extents: Mapping[str, Extent]) -> dict[str, torch.Tensor]:
    first = run.start - run.start % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(descriptor, run.stop - first, access=mmap.ACCESS_COPY, offset=first)
    return {
        key: extent.shaped(
            torch.frombuffer(pages, dtype=extent.dtype, count=extent.elements, offset=extent.start - first)
        )
        for key, extent in extents.items()
    }


def _convert(file, extent: Extent, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[no-untyped-def]  # io.FileIO
    """Read `PIECE_BYTES` at a time: a whole second copy of an embedding would be hundreds of MiB."""
    flat = torch.empty(extent.elements, dtype=dtype)
    piece = torch.empty(min(PIECE_BYTES // extent.dtype.itemsize, extent.elements), dtype=extent.dtype)
    raw = piece.view(torch.uint8).numpy().data
    file.seek(extent.start)
    for first in range(0, extent.elements, len(piece) or 1):
        count = min(len(piece), extent.elements - first)
        _read_exactly(file, raw[: count * extent.dtype.itemsize])
        flat[first : first + count] = piece[:count]
    return extent.shaped(flat)


def _read_exactly(file, target: memoryview) -> None:  # type: ignore[no-untyped-def]  # io.FileIO
    filled = 0
    while filled < len(target):
        got = file.readinto(target[filled:])
        if not got:
            raise ModelError(f"{Path(file.name).name} became shorter while it was read; fetch it again")
        filled += got
