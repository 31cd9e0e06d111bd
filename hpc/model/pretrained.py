"""A model's configuration and tokenizer by transformers, never running code from the model's folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.errors import ModelError
from hpc.source.files import FileResolver


def load_hf_config(resolver: FileResolver) -> Any:
    """The `PretrainedConfig`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(resolver.name_or_path, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{resolver} brings modelling code of its own (auto_map in its config.json) for a model that "
                "transformers does not know; such code is never run. Give a model that transformers has"
            ) from None
        first_line = str(error).strip().splitlines()[0]
        raise ModelError(f"{resolver} is not a model that transformers knows: {first_line}") from None
    if getattr(config, "pre_seq_len", None):
        config.pre_seq_len = None  # an adapter, not a part of the model (hpc.source.published_prefix)
    return config


def config_of_shape(shape: Mapping[str, Any]) -> Any:
    """The `PretrainedConfig` of a model that is known by the content of its config.json only."""
    from transformers import AutoConfig

    numbers = {key: value for key, value in shape.items() if key != "model_type"}
    try:
        return AutoConfig.for_model(str(shape.get("model_type")), **numbers)
    except (ValueError, KeyError) as error:
        raise ModelError(f"{dict(shape)} is not the shape of a model that transformers knows: {error}") from None


def load_tokenizer(resolver: FileResolver) -> Any:
    """The model's tokenizer (fast)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolver.name_or_path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise ModelError(f"{resolver} has no tokenizer: {str(error).strip().splitlines()[0]}") from None
