"""What a run has trained, taken up by parts that are built anew, to generate with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from hpc.checkpoint import checkpoint_folder, read_role
from hpc.errors import CheckpointError
from hpc.export.folder import read_folder
from hpc.export.portable import portable_name
from hpc.export.save import FOLDER
from hpc.model.part import Part
from hpc.resume import committed_steps

_PROJECTION = ".transform."


def take_up(parts: Sequence[Part], run: str, *, role: str, client: int) -> None:
    """Set what learns in `parts` to what the run in the folder `run` made of it.

    That is the adapter that `client` wrote at the end, with the trunk's part in it, or else `role`'s own file of the
    newest checkpoint. Raises `CheckpointError` if neither is here, or belongs to another model, cut or adapter.
    """
    adapter = Path(run) / FOLDER / f"client-{client}"
    names = [name for part in parts for name in part.trainable()]
    if adapter.is_dir() and not any(_PROJECTION in name for name in names):
        values, _, _ = read_folder(adapter)
        state: Mapping[str, torch.Tensor] = {f"parameter/{name}": values[portable_name(name)] for name in names}
    else:
        state = _from_checkpoint(run, role, client)
    for part in parts:
        part.load_trainable(state)


def _from_checkpoint(run: str, role: str, client: int) -> Mapping[str, torch.Tensor]:
    steps = committed_steps(run)
    if not steps:
        raise CheckpointError(
            f"{run} holds neither the adapter of client {client} in a form to go on with nor a finished checkpoint; "
            "train with --train.save_every"
        )
    folder = checkpoint_folder(run, steps[-1])
    replicas = sorted(folder.glob("trunk-*.safetensors")) if role == "trunk" else []
    for path in replicas:
        tensors, _ = read_role(folder, path.stem)
        own = f"replica-{client}/"
        found = {name.removeprefix(own): value for name, value in tensors.items() if name.startswith(own)}
        if found:
            return found
    return read_role(folder, role)[0]
