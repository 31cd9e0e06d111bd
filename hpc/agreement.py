"""What the two ends of a link, or a run and the checkpoint it takes up, must have alike. Pure."""

from __future__ import annotations

from pathlib import Path

from hpc import __version__
from hpc.config import Config


def agreement(config: Config) -> dict[str, str]:
    """Key → value as text; compared key by key, so that what differs can be named with both values."""
    agreed = {"hpc.version": __version__, "trunk.ranks": str(config.trunk.ranks)}
    for group in ("model", "adapter", "train"):
        values = vars(getattr(config, group))
        agreed |= {f"{group}.{key}": str(value) for key, value in values.items()}
    agreed["model.name_or_path"] = Path(config.model.name_or_path).name
    agreed["data.val_examples"] = str(config.data.val_examples if config.data.evaluates else 0)
    return agreed
