"""Reading only the tensors that a part owns, by key, from a model's safetensors files.

Nothing else of the files is mapped into tensors, so no process ever holds weights that it does not own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from hpc.errors import ModelError
from hpc.source.files import FileResolver

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightSource:
    """The tensors of one model, by their key in the whole model.

    `keys_read` and `bytes_read` record what was opened, so that a test can hold each role to its own part.
    """

    def __init__(self, resolve: FileResolver) -> None:
        self._resolve = resolve
        self._file_of_key = self._index()
        self.keys_read: set[str] = set()
        self.bytes_read = 0

    def _index(self) -> dict[str, str]:
        index = self._resolve(INDEX)
        if index is not None:
            return dict(json.loads(index.read_text())["weight_map"])
        single = self._resolve(SINGLE)
        if single is None:
            raise ModelError(f"{self._resolve} holds neither {SINGLE} nor {INDEX}; save the model with safetensors")
        with _open(single) as shard:
            return dict.fromkeys(shard.keys(), SINGLE)

    def read(self, keys: list[str], *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The named tensors in `dtype` (integer tensors keep theirs). Raises `ModelError` naming what is missing."""
        missing = [key for key in keys if key not in self._file_of_key]
        if missing:
            raise ModelError(f"{self._resolve} lacks {len(missing)} tensors of this architecture, first {missing[0]}")
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted({self._file_of_key[key] for key in keys}):
            path = self._resolve(file)
            if path is None:
                raise ModelError(f"{self._resolve} lacks the shard {file} that its index names")
            with _open(path) as shard:
                for key in (key for key in keys if self._file_of_key[key] == file):
                    tensor = shard.get_tensor(key)
                    self.keys_read.add(key)
                    self.bytes_read += tensor.nbytes
                    tensors[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        return tensors


def _open(path: Path):  # type: ignore[no-untyped-def]  # safe_open's handle type is not exported
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is not a whole safetensors file ({error}); fetch it again") from None
