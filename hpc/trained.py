"""What a run has trained, taken up by parts that are built anew, to generate with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from hpc.agreement import lasting_agreement
from hpc.checkpoint import checkpoint_folder, read_role
from hpc.config import Config
from hpc.errors import CheckpointError
from hpc.export.folder import read_folder
from hpc.export.origin import Origin
from hpc.export.portable import portable_name
from hpc.export.save import FOLDER
from hpc.model.part import Part
from hpc.redeal import read_replicas
from hpc.resume import LATEST, Found, find
from hpc.schedule import clients_of_step

_PROJECTION = ".transform."
Wanted = Literal["auto", "adapter", "checkpoint"]


@dataclass(kw_only=True, frozen=True)
class Source:
    """The adapter that a client wrote at the end of a run, or a checkpoint of it."""

    run: Path
    client: int
    found: Found | None
    """None: the adapter."""

    @property
    def name(self) -> str:
        """Both ends of a link must have taken up the same."""
        return "adapter" if self.found is None else f"checkpoint-{self.found.step}"


def source_of(run: str, config: Config, client: int, wanted: Wanted) -> Source:
    """`auto`: the adapter if it is here, else the last whole checkpoint.

    Raises `CheckpointError` if it is not here, or was made with other settings.
    """
    adapter = Path(run) / FOLDER / f"client-{client}"
    if wanted == "adapter" and not adapter.is_dir():
        raise CheckpointError(f"--source adapter: {run} holds no {FOLDER}/client-{client}; use --source checkpoint")
    if adapter.is_dir() and wanted != "checkpoint":
        return Source(run=Path(run), client=client, found=None)
    return Source(run=Path(run), client=client, found=find(run, LATEST, lasting_agreement(config)))


def take_up(parts: Sequence[Part], source: Source, config: Config, *, role: str) -> None:
    """Set what learns in `parts` to what `source` has for `role`.

    Raises `CheckpointError` if it belongs to another model, cut or adapter, or is not whole.
    """
    names = [name for part in parts for name in part.trainable()]
    state = _of_adapter(source, config, names) if source.found is None else _of_checkpoint(source, config, role)
    lacking = [name for name in names if f"parameter/{name}" not in state]
    if lacking:
        raise CheckpointError(f"{source.run}, {source.name}, lacks {len(lacking)} tensors, first {lacking[0]}")
    for part in parts:
        part.load_trainable(state)


def _of_adapter(source: Source, config: Config, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
    folder = source.run / FOLDER / f"client-{source.client}"
    values, origin, _ = read_folder(folder)
    origin.require_same(Origin.of(config, origin.role), str(folder))
    if any(_PROJECTION in name for name in names):
        raise CheckpointError(
            f"{folder} holds prefixes without the network that made them; use --source checkpoint (and train with "
            "--train.save_every)"
        )
    return {f"parameter/{n}": values[portable_name(n)] for n in names if portable_name(n) in values}


def _of_checkpoint(source: Source, config: Config, role: str) -> Mapping[str, torch.Tensor]:
    assert source.found is not None
    step, attempt, client = source.found.step, source.found.attempt, source.client
    folder = checkpoint_folder(source.run, step)
    newest = clients_of_step(config.train, step - 1)[0] if config.train.hands_over else client
    if client != newest:
        raise CheckpointError(
            f"checkpoint-{step} was written when client {newest} had the newest parts; use --client {newest}"
        )
    if role != "trunk" or config.train.schedule != "replica":
        return read_role(folder, role, attempt=attempt)[0]
    tensors, _ = read_replicas(folder, [client], rank=0, attempt=attempt, learns=True)
    own = f"replica-{client}/"
    return {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
