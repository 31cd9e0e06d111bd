"""safetensors: a JSON header with every tensor's dtype, shape and place, then the values.

The header is read here rather than by the safetensors library, whose handle maps the whole file and keeps what was
converted resident. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hpc.errors import ModelError
from hpc.model.shards.extent import PLAIN_DTYPES, Extent, foreign_dtype, read_extents

MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(kw_only=True, frozen=True)
class _Entry:
    """A tensor in the header; `first` and `last` in bytes after the header."""

    dtype: str
    shape: tuple[int, ...]
    first: int
    last: int


class SafetensorsShard:
    """One safetensors file. Raises `ModelError` unless header and size of the file fit each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries, self._data_start = _read_header(path)

    def keys(self) -> Iterable[str]:
        return self._entries.keys()

    def stored_bytes(self, key: str) -> int:
        return self._entries[key].last - self._entries[key].first

    def read(self, keys: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return read_extents(self.path, {key: self._extent(key) for key in keys}, dtype)

    def _extent(self, key: str) -> Extent:
        entry = self._entries[key]
        if entry.dtype not in PLAIN_DTYPES:
            raise foreign_dtype(self.path, key, entry.dtype)
        stride = tuple(math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape)))
        start = self._data_start + entry.first
        extent = Extent(dtype=PLAIN_DTYPES[entry.dtype], shape=entry.shape, stride=stride, start=start)
        if extent.end - extent.start != self.stored_bytes(key):
            raise _broken(self.path, f"{key} of shape {entry.shape} does not have {self.stored_bytes(key)} bytes")
        return extent


def _read_header(path: Path) -> tuple[dict[str, _Entry], int]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(path, f"a header of {length} bytes in a file of {size}")
        try:
            header = json.loads(file.read(length))
            entries = {key: _entry(told) for key, told in header.items() if key != "__metadata__"}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _broken(path, f"its header does not parse: {type(error).__name__} {error}") from None
    end = max((entry.last for entry in entries.values()), default=0)
    if end != size - 8 - length:
        raise _broken(path, f"{size - 8 - length} bytes of values, where its header says {end}")
    return entries, 8 + length


def _entry(told: dict[str, Any]) -> _Entry:
    first, last = (int(place) for place in told["data_offsets"])
    shape = tuple(int(axis) for axis in told["shape"])
    if min((first, last - first, *shape)) < 0:
        raise ValueError("negative size")
    return _Entry(dtype=str(told["dtype"]), shape=shape, first=first, last=last)


def _broken(path: Path, reason: str) -> ModelError:
    return ModelError(f"{path.name} is not a whole safetensors file ({reason}); fetch it again")
