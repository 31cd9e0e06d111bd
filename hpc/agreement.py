"""What the two ends of a link, or a run and the checkpoint it takes up, must have alike. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from hpc import __version__
from hpc.config import Config
from hpc.source.resolve import read_config, resolve

# Alike at both ends of a link, but not in a checkpoint and the run that takes it up: what these say is told anew, or
# what they change lies ahead. The links themselves (`link.*`), the ZeRO stage and paths are in no agreement at all.
FREE_ON_RESUME = frozenset(
    {
        "trunk.ranks",
        "trunk.smashed_cache_mib",
        "train.max_steps",
        "train.rounds",
        "train.learning_rate",
        "train.save_every",
        "train.save_total_limit",
        "train.eval_every",
        "train.eval_before",
        "train.eval_batch_size",
        "train.early_stopping_patience",
        "train.on_nonfinite",
        "train.min_clients",
        "data.val_examples",
        "data.evaluate_by",
        "run.save_adapter",
    }
)


def agreement(config: Config) -> dict[str, str]:
    """Key → value as text; compared key by key, so that what differs can be named with both values."""
    agreed = {"hpc.version": __version__, "trunk.ranks": str(config.trunk.ranks)}
    for group in ("model", "adapter", "train"):
        values = vars(getattr(config, group))
        agreed |= {f"{group}.{key}": str(value) for key, value in values.items()}
    # Folders are called differently on different machines; the model's own configuration must be the same.
    raw_config = read_config(resolve(config.model))
    told = {k: v for k, v in raw_config.items() if k not in ("_name_or_path", "transformers_version")}
    agreed["model.name_or_path"] = Path(config.model.name_or_path).name
    agreed["model.config_sha256"] = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    agreed["data.val_examples"] = str(config.data.val_examples if config.data.evaluates else 0)
    agreed["data.evaluate_by"] = config.data.evaluate_by if config.data.evaluates else "nothing"
    agreed["data.longest_row"] = str(config.data.longest_row)
    agreed["run.save_adapter"] = str(config.run.save_adapter)
    agreed["trunk.quantization"] = config.trunk.quantization
    agreed["trunk.smashed_cache_mib"] = str(config.trunk.smashed_cache_mib)
    return agreed


def lasting_agreement(config: Config) -> dict[str, str]:
    """The part of `agreement` that a checkpoint and the run that takes it up must have alike.

    Where all clients' parts are alike, and the trunk has nothing of a single client's, their number may change.
    """
    free = FREE_ON_RESUME
    if config.train.shares_state and config.train.schedule in ("client_batch", "pipelined"):
        free |= {"train.clients"}
    return {key: value for key, value in agreement(config).items() if key not in free}
