"""The trunk's DeepSpeed JSON file, read and checked without importing DeepSpeed or torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc.errors import ConfigError


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """The DeepSpeed configuration; without a file, ZeRO stage 0. Raises `ConfigError` naming file and line."""
    if path is None:
        return {}
    try:
        settings = json.loads(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--trunk.deepspeed {path} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"--trunk.deepspeed {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"--trunk.deepspeed {path} holds a {type(settings).__name__}; it must be a JSON object")
    ours = {
        "optimizer": "--train.learning_rate and its neighbours",
        "scheduler": "--train.lr_scheduler",
        "gradient_clipping": "--train.max_grad_norm, which clips by the norm over all three parts",
        "fp16": "--model.dtype",
        "bf16": "--model.dtype",
        "gradient_accumulation_steps": "--train.per_client_batch_size",
        "train_batch_size": "--train.per_client_batch_size",
        "train_micro_batch_size_per_gpu": "--train.per_client_batch_size",
        "prescale_gradients": "--train.aggregation",
        "gradient_predivide_factor": "--train.aggregation",
    }
    for key, flag in ours.items():
        if key in settings:
            raise ConfigError(f"--trunk.deepspeed {path} sets {key!r}; all parts need the same, so use {flag}")
    zero = settings.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(
            f"--trunk.deepspeed {path} has zero_optimization.stage {json.dumps(stage)}; it must be 0, 1, 2 or 3"
        )
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of settings that `read_deepspeed_json` has checked."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))
