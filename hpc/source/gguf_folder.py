"""A GGUF file as a model: where it is, and the folder with the configuration and tokenizer that belong to it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hpc.errors import ModelError
from hpc.source.cache import cached_folder
from hpc.source.gguf_file import GgufFile
from hpc.source.gguf_llama import open_llama, write_configs
from hpc.source.gguf_tokenizer import write_tokenizer

OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json")


def gguf_of(name_or_path: str) -> Path | None:
    """The GGUF file that is meant: the file itself, or the only one of a folder with weights in no other format.

    Raises `ModelError` if it is not there, or if the folder has several.
    """
    path = Path(name_or_path)
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise ModelError(f"--model.name_or_path {name_or_path}: there is no such file")
        return path
    if not path.is_dir() or any(True for pattern in OTHER_WEIGHTS for _ in path.glob(pattern)):
        return None
    found = sorted(path.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{path} holds {', '.join(f.name for f in found)}; give the path of the file that is meant")
    return found[0] if found else None


def gguf_folder(gguf: Path) -> Path:
    """The file's own folder if it has a config.json, else a folder of the cache, derived from the file's header.

    Raises `ModelError` for an architecture or tokenizer that cannot be derived.
    """
    if (gguf.parent / "config.json").is_file():
        return gguf.parent
    file = open_llama(gguf)
    return cached_folder(f"gguf-{gguf.stem}-{_header_hash(file)}-1", lambda folder: _write(file, folder))


def _write(file: GgufFile, folder: Path) -> None:
    write_configs(file, folder)
    write_tokenizer(file, folder)


def _header_hash(file: GgufFile) -> str:
    """Configuration and tokenizer depend on nothing but the header."""
    with file.path.open("rb") as raw:
        return hashlib.sha256(raw.read(file.data_start)).hexdigest()[:12]
