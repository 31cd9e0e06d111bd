"""From a model's name to its files: the embedded model, the random tiny one, a folder, a GGUF file, or a hub name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc.config import ModelConfig
from hpc.errors import ModelError
from hpc.source.cut import Cut
from hpc.source.files import FileResolver
from hpc.source.gguf_folder import gguf_folder, gguf_of

BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT_SECTIONS = ("text_config", "llm_config", "language_config")


def resolve(model: ModelConfig) -> FileResolver:
    """Where the model's files are; the built-in models are written into the cache folder first.

    Raises `ModelError` for a folder without a model, and for a hub name that cannot be fetched.
    """
    if model.name_or_path == "smollm2-135m":
        from hpc.source.smollm2 import smollm2_folder

        return FileResolver(str(smollm2_folder()))
    if model.name_or_path == "tiny-llama":
        from hpc.source.tiny import tiny_llama_folder

        return FileResolver(str(tiny_llama_folder(seed=model.init_seed)))
    gguf = gguf_of(model.name_or_path)
    if gguf is not None:
        return FileResolver(str(gguf_folder(gguf)), gguf=gguf)
    return FileResolver(model.name_or_path)


def read_config(resolver: FileResolver) -> dict[str, Any]:
    """The model's config.json. Raises `ModelError` that says what was looked for and where."""
    try:
        path = resolver("config.json")
    except Exception as error:  # the hub client's own tree of network and name errors
        raise ModelError(
            f"{resolver} is neither a folder nor reachable on the hub ({type(error).__name__}); "
            "give a folder with config.json, or one of smollm2-135m, tiny-llama"
        ) from None
    if path is None:
        looks_local = Path(resolver.name_or_path).exists() or resolver.name_or_path.startswith((".", "/", "~"))
        place = "has no config.json in it" if looks_local else "is neither a folder here nor a model on the hub"
        raise ModelError(
            f"{resolver} {place}; give a folder with config.json, a hub name, or one of smollm2-135m, tiny-llama"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"config.json of {resolver} is not JSON ({error}); fetch it again") from None
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{resolver} is an encoder-decoder, which cannot be cut; give a decoder (a causal LM)")
    if block_count(config) is None:
        raise ModelError(
            f"config.json of {resolver} has none of {', '.join(BLOCK_COUNTS)}: not a decoder that can be cut"
        )
    return config


def block_count(raw_config: dict[str, Any]) -> int | None:
    """The number of blocks, under whichever name the family has for it; models of more than text nest it."""
    sections = [raw_config, *(raw_config.get(name) or {} for name in TEXT_SECTIONS)]
    counts = [section[name] for section in sections for name in BLOCK_COUNTS if isinstance(section.get(name), int)]
    return counts[0] if counts else None


def cut_of(model: ModelConfig, raw_config: dict[str, Any]) -> Cut:
    """The cut that the configuration asks for. Raises `ConfigError` if it leaves no trunk."""
    blocks = block_count(raw_config)
    assert blocks is not None, "read_config refuses such a configuration"
    return Cut(blocks=blocks, head_blocks=model.head_blocks, tail_blocks=model.tail_blocks)
