"""The header of a GGUF file: its fields, and where each tensor lies. The values stay in the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader takes seconds and
160 MB over a vocabulary of 50,000; every role reads this header, so it is read here. Imports no torch.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hpc.errors import ModelError

VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# GGUF's value type → struct's.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(kw_only=True, frozen=True)
class GgufTensor:
    """One tensor: `shape` as torch has it (rows first), `kind` a `gguf.GGMLQuantizationType`, place in bytes."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    start: int
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of the last axis's length; a vector is one row."""
        return math.prod(self.shape[:-1])


class GgufFile:
    """A file's fields and tensors. Raises `ModelError` if it is another format, or truncated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = path.stat().st_size
        with path.open("rb") as file:
            self._file: BinaryIO | None = file
            tensor_count = self._begin()
            self.fields = {self._string(): self._value(self._scalar("I")) for _ in range(self._scalar("Q"))}
            described = [self._description() for _ in range(tensor_count)]
            self.data_start = self._aligned(file.tell())
            self._file = None
        self.tensors = {entry[0]: self._tensor(*entry) for entry in described}

    def field(self, name: str, default: Any = None) -> Any:
        """A field's value. Raises `ModelError` if it is missing and has no default."""
        if name in self.fields:
            return self.fields[name]
        if default is None:
            raise ModelError(f"{self.path.name} has no field {name}; give the model's Hugging Face folder instead")
        return default

    def _begin(self) -> int:
        if self._read(4) != b"GGUF":
            raise ModelError(f"{self.path.name} is not a GGUF file: it does not begin with the letters GGUF")
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ModelError(f"{self.path.name} is GGUF version {version} or big-endian; versions 2 and 3 are read")
        return int(self._scalar("Q"))

    def _read(self, count: int) -> bytes:
        assert self._file is not None
        data = self._file.read(count) if count <= self._size else b""
        if len(data) != count:
            raise self._truncated("inside its header")
        return data

    def _scalar(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._read(struct.calcsize(f"<{kind}")))[0]

    def _string(self) -> str:
        return self._read(self._scalar("Q")).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind != ARRAY:
            raise ModelError(f"{self.path.name} has a field of the unknown type {kind}; it is broken or newer")
        items, count = self._scalar("I"), self._scalar("Q")
        if items in SCALARS:
            width = struct.calcsize(f"<{SCALARS[items]}")
            return list(struct.unpack(f"<{count}{SCALARS[items]}", self._read(count * width)))
        return [self._value(items) for _ in range(count)]

    def _description(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._string(), self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(axes))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _aligned(self, position: int) -> int:
        alignment = int(self.fields.get("general.alignment", 32))
        return -(-position // alignment) * alignment

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if kind not in list(GGMLQuantizationType):
            raise ModelError(f"{name} in {self.path.name} is stored as the unknown type {kind}; it is broken or newer")
        quantisation = GGMLQuantizationType(kind)
        values, width = GGML_QUANT_SIZES[quantisation]
        start, nbytes = self.data_start + offset, math.prod(shape) // values * width
        if start + nbytes > self._size:
            raise self._truncated(f"inside {name}, which ends at byte {start + nbytes}")
        return GgufTensor(name=name, shape=shape, kind=quantisation, start=start, nbytes=nbytes)

    def _truncated(self, where: str) -> ModelError:
        return ModelError(
            f"{self.path.name} is not a whole GGUF file: it ends at byte {self._size}, {where}; fetch it again"
        )
