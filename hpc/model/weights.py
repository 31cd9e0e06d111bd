"""Reading only the tensors that a part owns, by key, straight in the asked dtype.

Shards that hold none of them are never opened, and nothing else of a shard is read, so no process ever holds weights
that it does not own. Formats: safetensors (preferred where there is a choice), PyTorch's `.bin`, GGUF.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hpc.errors import ModelError
from hpc.model.shards.gguf import GgufShard
from hpc.model.shards.safetensors import SafetensorsShard
from hpc.model.shards.shard import Shard
from hpc.model.shards.torch_bin import TorchBinShard
from hpc.source.checksums import Checksums
from hpc.source.files import FileResolver

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FORMATS: dict[str, type[SafetensorsShard | TorchBinShard | GgufShard]] = {
    ".safetensors": SafetensorsShard,
    ".bin": TorchBinShard,
    ".gguf": GgufShard,
}


class WeightSource:
    """The tensors of one model, by their key in the whole model.

    `keys_read`, `bytes_read` (bytes as the file stores them) and `files_opened` (names) record what was read, so that
    a test can hold each role to its own part. If the model's folder has a `SHA256SUMS`, each file is verified against
    it before it is opened.
    """

    def __init__(self, resolve: FileResolver) -> None:
        self._resolve = resolve
        self._checksums = Checksums(resolve.weights_folder)
        self._shards: dict[str, Shard] = {}
        self.keys_read: set[str] = set()
        self.bytes_read = 0
        self.files_opened: set[str] = set()
        self._file_of_key = self._index()

    @property
    def keys(self) -> list[str]:
        """The names of all tensors in the files."""
        return list(self._file_of_key)

    def _index(self) -> dict[str, str]:
        if self._resolve.gguf is not None:
            return self._contents(self._resolve.gguf.name)
        for index_name, single in ((INDEX, SINGLE), (BIN_INDEX, BIN_SINGLE)):
            index = self._resolve(index_name)
            if index is not None:
                return _weight_map(index)
            if self._resolve(single) is not None:
                return self._contents(single)
        raise ModelError(
            f"{self._resolve} holds none of {SINGLE}, {INDEX}, {BIN_SINGLE} and {BIN_INDEX}; "
            "fetch it again, or save the model with safetensors"
        )

    def _contents(self, file: str) -> dict[str, str]:
        return dict.fromkeys(self._open(file).keys(), file)

    def _open(self, file: str) -> Shard:
        """Raises `ModelError` if the file is missing, not the one that SHA256SUMS lists, or truncated."""
        if file not in self._shards:
            path = self._resolve(file)
            if path is None:
                raise ModelError(
                    f"{self._resolve} lacks the shard {file} that its index names; fetch that file into the same folder"
                )
            self._checksums.verify(path)
            self._shards[file] = _shard(path)
            self.files_opened.add(file)
        return self._shards[file]

    def read(self, keys: list[str], *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The named tensors in `dtype` (integer tensors keep theirs). Raises `ModelError` naming what is missing."""
        missing = [key for key in keys if key not in self._file_of_key]
        if missing:
            raise ModelError(f"{self._resolve} lacks {len(missing)} tensors of this architecture, first {missing[0]}")
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted({self._file_of_key[key] for key in keys}):
            tensors |= self._read_from(file, [key for key in keys if self._file_of_key[key] == file], dtype)
        return tensors

    def _read_from(self, file: str, keys: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        shard = self._open(file)
        absent = sorted(set(keys) - set(shard.keys()))
        if absent:
            raise ModelError(
                f"{file} lacks {absent[0]}, which the index of {self._resolve} places there: index and shards are "
                "not of the same checkpoint; fetch them all again"
            )
        tensors = shard.read(keys, dtype)
        self.keys_read.update(keys)
        self.bytes_read += sum(shard.stored_bytes(key) for key in keys)
        return tensors


def _shard(path: Path) -> Shard:
    if path.suffix not in FORMATS:
        raise ModelError(f"the shard {path.name} is in none of the formats {', '.join(FORMATS)}")
    try:
        return FORMATS[path.suffix](path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return {str(key): str(file) for key, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{index.name} does not map keys to shards ({type(error).__name__}: {error}); fetch it again"
        ) from None
