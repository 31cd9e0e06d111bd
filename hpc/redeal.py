"""The replicas of one trunk rank's clients, also from a checkpoint of another number of trunk ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hpc.checkpoint import read_role, read_stamp, tensor_names
from hpc.errors import CheckpointError


def read_replicas(
    folder: Path, clients: Sequence[int], *, rank: int, attempt: str, learns: bool
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Tensors and facts of `clients`, which trunk rank `rank` now has, from whichever ranks' files hold them.

    With as many ranks as before, that is the rank's own file. Raises `CheckpointError` if a file is broken, or if this
    rank cannot see the one that holds a client.
    """
    own = f"trunk-{rank}"
    if not learns:  # every file is as good: there are only the facts
        return read_role(folder, own if (folder / f"{own}.safetensors").exists() else "trunk-0", attempt=attempt)
    missing, foreign = set(clients), list[str]()
    tensors, facts = dict[str, torch.Tensor](), dict[str, float]()
    for path in sorted(folder.glob("trunk-*.safetensors"), key=lambda path: path.stem != own):
        held = {client for client in missing if _prefix(client) in _prefixes(path)}
        if not held:
            continue
        if read_stamp(path).attempt != attempt:  # left by an attempt with more ranks, which was killed
            foreign.append(path.name)
            continue
        found, facts = read_role(folder, path.stem, attempt=attempt)
        tensors |= {name: value for name, value in found.items() if any(name.startswith(_prefix(c)) for c in held)}
        missing -= held
    if missing:
        ignored = f" ({', '.join(foreign)}: written by another run, or another attempt of it)" if foreign else ""
        raise CheckpointError(
            f"{folder} holds no trunk rank's file with the replica of client {min(missing)}{ignored}. To resume with "
            "another --trunk.ranks each trunk rank must see the files of all: use a shared folder, or copy them there"
        )
    return tensors, facts


def _prefix(client: int) -> str:
    return f"replica-{client}/"


def _prefixes(path: Path) -> set[str]:
    return {name.partition("/")[0] + "/" for name in tensor_names(path)}
