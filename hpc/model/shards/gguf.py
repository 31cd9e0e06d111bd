"""A GGUF file of the Llama architecture: blocks of a few bits a value, dequantised tensor by tensor.

Keys and order of rows are Hugging Face's (`hpc.source.gguf_llama`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from hpc.source.gguf_llama import hf_name, open_llama, rows_of


class GgufShard:
    """One GGUF file; `stored_bytes` counts the quantised blocks. Raises `ModelError` as `open_llama` does."""

    def __init__(self, path: Path) -> None:
        self._file = open_llama(path)
        self._tensors = {hf_name(name): tensor for name, tensor in self._file.tensors.items()}

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def stored_bytes(self, key: str) -> int:
        return self._tensors[key].nbytes

    def read(self, keys: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        return {key: self._dequantised(key, dtype) for key in keys}

    def _dequantised(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        tensor = self._tensors[key]
        values = torch.empty(tensor.rows, tensor.shape[-1], dtype=dtype)
        for first, rows in rows_of(self._file, tensor):
            values[first : first + len(rows)] = torch.from_numpy(rows)
        return values.reshape(tensor.shape)
