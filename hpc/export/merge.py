"""The base model with what learned put into its weights: a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hpc.errors import ConfigError
from hpc.export.origin import Origin
from hpc.model.pretrained import load_tokenizer
from hpc.source.resolve import resolve


def require_mergeable(origin: Origin) -> None:
    """Raise `ConfigError` for prefixes: they are keys and values in front of the text, not a change of any weight."""
    if origin.adapter.method == "p_tuning_v2":
        raise ConfigError(
            "--merge cannot put the prefixes of p_tuning_v2 into the model's weights: they are keys and values in "
            "front of the text; leave out --merge and load the adapter with PEFT"
        )


def write_merged(
    folder: Path, adapter: Path, values: Mapping[str, torch.Tensor], origin: Origin, dtype: torch.dtype
) -> None:
    """Write configuration, tokenizer and merged weights into `folder`. `adapter` is LoRA's PEFT folder.

    Merged in float32 and rounded to `dtype` once, at the end.
    """
    from transformers import AutoModelForCausalLM

    resolver = resolve(origin.model)
    if resolver.gguf is not None:
        raise ConfigError(f"--merge: {resolver} is a GGUF file; merge into the model's safetensors folder instead")
    base = AutoModelForCausalLM.from_pretrained(resolver.name_or_path, dtype=torch.float32, trust_remote_code=False)
    model = _with_lora(base, adapter) if origin.adapter.method == "lora" else _with_values(base, values)
    model.to(dtype).save_pretrained(folder)
    load_tokenizer(resolver).save_pretrained(folder)


def _with_lora(base: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def _with_values(base: Any, values: Mapping[str, torch.Tensor]) -> Any:
    base.load_state_dict(dict(values), strict=False)  # the names were checked; the rest stays as it was
    base.tie_weights()
    return base
