"""Which run an adapter comes from: `export.json` beside it, read again before the adapter is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.agreement import agreement
from hpc.config import AdapterConfig, Config, ModelConfig
from hpc.errors import CheckpointError

ORIGIN = "export.json"


@dataclass(kw_only=True, frozen=True)
class Origin:
    """Whose adapter, of which model and cut."""

    role: str
    """`client-<k>`, or `centralised`."""
    model: ModelConfig
    adapter: AdapterConfig
    config_sha256: str
    """Of the model's own configuration (`hpc.agreement`)."""

    @staticmethod
    def of(config: Config, role: str) -> Origin:
        sha = agreement(config)["model.config_sha256"]
        return Origin(role=role, model=config.model, adapter=config.adapter, config_sha256=sha)

    def write(self, folder: Path) -> None:
        (folder / ORIGIN).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Origin:
        """Raises `CheckpointError` if `folder` is not an adapter that a run wrote."""
        path = folder / ORIGIN
        try:
            found = json.loads(path.read_text())
            found |= {"model": ModelConfig(**found["model"]), "adapter": AdapterConfig(**found["adapter"])}
            return Origin(**found)
        except OSError:
            raise CheckpointError(f"{folder} has no {ORIGIN}: it is not an adapter that a run wrote") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path} is broken ({error}); copy it from the run again") from None

    def require_model(self, what: str) -> None:
        """Raise `CheckpointError` if the model's own configuration is not what it was; `ModelError` without a model."""
        now = agreement(Config(model=self.model, adapter=self.adapter))["model.config_sha256"]
        if now != self.config_sha256:
            raise CheckpointError(
                f"{what} was trained on another model: the configuration of {self.model.name_or_path} has the hash "
                f"{now}, then {self.config_sha256}"
            )

    def require_same(self, other: Origin, what: str) -> None:
        """Raise `CheckpointError` that names what differs from the model, cut and adapter of `other`."""
        mine, theirs = self._compared(), other._compared()
        differing = [f"{key}: {mine[key]}, here {theirs[key]}" for key in mine if mine[key] != theirs[key]]
        if differing:
            raise CheckpointError(f"{what} is of another model, cut or adapter ({'; '.join(differing)})")

    def _compared(self) -> Mapping[str, Any]:
        model = {f"model.{key}": value for key, value in asdict(self.model).items() if key != "name_or_path"}
        adapter = {f"adapter.{key}": value for key, value in asdict(self.adapter).items()}
        # A folder may be called differently on another machine; what is in it may not differ.
        return {**model, **adapter, "model.config_sha256": self.config_sha256}
