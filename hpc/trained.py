"""What a run has trained, taken up by parts that are built anew. Each role reads its own file only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc.checkpoint import checkpoint_folder, read_role
from hpc.errors import CheckpointError
from hpc.model.part import Part
from hpc.resume import committed_steps


def take_up(parts: Sequence[Part], folder: str, role: str, *, clients: Sequence[int] = ()) -> None:
    """Set what learns in `parts` to what the newest checkpoint of the run in `folder` holds for `role`.

    Raises `CheckpointError` if there is none, or if it was made by another model, cut or adapter.
    """
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointError(f"{folder} holds no finished checkpoint; train with --train.save_every")
    tensors, _ = read_role(checkpoint_folder(Path(folder), steps[-1]), role)
    for part in parts:
        part.load_trainable(tensors)
