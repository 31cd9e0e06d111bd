"""`pytorch_model.bin`: PyTorch's own format, read with `weights_only`, so that no code in the file is ever run.

The current format is a zip archive that stores values as they are: torch tells where each tensor's lie without
reading any (its notes on serialization, "storage offsets"), and only the owned ones are read. The format before
PyTorch 1.6 has no such table; such a file is read whole, and what is not owned is let go at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from hpc.errors import ModelError
from hpc.model.shards.extent import PLAIN_DTYPES, Extent, foreign_dtype, read_extents


class TorchBinShard:
    """One `.bin` file. Raises `ModelError` if it is truncated, or holds anything but tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = _load(path, map_location="meta")
        if not isinstance(content, dict):
            raise ModelError(f"{path.name} holds a {type(content).__name__}, not tensors by name; save a state dict")
        self._described = {str(key): value for key, value in content.items() if isinstance(value, torch.Tensor)}

    def keys(self) -> Iterable[str]:
        return self._described.keys()

    def stored_bytes(self, key: str) -> int:
        return self._described[key].nbytes

    def read(self, keys: list[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        for key in keys:
            if self._described[key].dtype not in PLAIN_DTYPES.values():
                raise foreign_dtype(self.path, key, str(self._described[key].dtype))
        places = {key: self._described[key].untyped_storage()._checkpoint_offset for key in keys}
        extents = {key: self._extent(key, place) for key, place in places.items() if place is not None}
        if len(extents) == len(keys):
            return read_extents(self.path, extents, dtype)
        whole = _load(self.path, map_location="cpu")
        return {
            key: tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype, copy=True).contiguous()
            for key, tensor in whole.items()
            if key in keys
        }

    def _extent(self, key: str, storage_start: int) -> Extent:
        tensor = self._described[key]
        start = storage_start + int(tensor.storage_offset()) * tensor.itemsize
        return Extent(dtype=tensor.dtype, shape=tuple(tensor.shape), stride=tensor.stride(), start=start)


def _load(path: Path, *, map_location: str) -> Any:
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if "weights_only" not in str(error).lower().replace(" ", "_"):
            raise _broken(path, error) from None
        raise ModelError(
            f"{path.name} holds more than tensors and is not opened, since that could run code in it; "
            "give the model as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> ModelError:
    first_sentence = (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]
    return ModelError(f"{path.name} is not a whole PyTorch checkpoint ({first_sentence}); fetch it again")
