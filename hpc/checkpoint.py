"""One consistent cut of a run at a step boundary: every role's file, and a manifest that is committed last.

`<run folder>/checkpoint-<step>/<role>.safetensors` and `manifest.json`. A checkpoint without a manifest was not
finished and does not exist. Each role writes and reads its own file only, so client parts never leave a client. Batches
and dropout are functions of the step, so parameters, optimiser state, loss scale and the step are all there is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpc.errors import CheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
# What may differ between a checkpoint and the run that takes it up.
FREE = (
    "train.max_steps",
    "train.rounds",
    "train.learning_rate",
    "train.save_every",
    "train.eval_every",
    "train.early_stopping_patience",
    "train.on_nonfinite",
    "train.min_clients",
    "data.val_examples",
    "data.evaluate_by",
)


def checkpoint_folder(run_folder: str | Path, step: int) -> Path:
    return Path(run_folder) / f"checkpoint-{step}"


def write_role(
    run_folder: str | Path, step: int, role: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, float]
) -> None:
    """Write one role's state, whole or not at all."""
    folder = checkpoint_folder(run_folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{role}.{os.getpid()}"
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, draft, metadata={name: float(value).hex() for name, value in facts.items()})
    _to_disk(draft)
    draft.replace(folder / f"{role}.safetensors")


def read_role(folder: Path, role: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One role's state. Raises `CheckpointError` if its file is missing or broken."""
    path = folder / f"{role}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            facts = {name: float.fromhex(value) for name, value in (file.metadata() or {}).items()}
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint") from None


def commit(run_folder: str | Path, step: int, agreement: Mapping[str, str]) -> None:
    """Make the checkpoint exist. Call when every role has written its file."""
    folder = checkpoint_folder(run_folder, step)
    folder.mkdir(parents=True, exist_ok=True)  # where nothing learns in the trunk, this is its first file
    draft = folder / f".{MANIFEST}.{os.getpid()}"
    draft.write_text(json.dumps({"step": step, "agreement": dict(agreement)}, indent=1))
    _to_disk(draft)
    draft.replace(folder / MANIFEST)


def find(run_folder: str | Path, which: str, agreement: Mapping[str, str]) -> int:
    """The step of the checkpoint to resume from: `latest`, or the name of a checkpoint folder in the run's folder.

    Raises `CheckpointError` if there is none, or if it was made with other settings (both values are named).
    """
    steps = committed_steps(run_folder)
    wanted = re.fullmatch(r"(?:.*/)?checkpoint-(\d+)/?", which)
    if which != LATEST and wanted is None:
        raise CheckpointError(f"--run.resume_from_checkpoint {which} must be latest or checkpoint-<step>")
    if not steps or (wanted is not None and int(wanted[1]) not in steps):
        have = ", ".join(f"checkpoint-{step}" for step in steps) or "no finished checkpoint"
        raise CheckpointError(f"--run.resume_from_checkpoint {which}: {run_folder} holds {have}")
    step = steps[-1] if wanted is None else int(wanted[1])
    _check_alike(json.loads((checkpoint_folder(run_folder, step) / MANIFEST).read_text()), agreement, step)
    return step


def committed_steps(run_folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints, in order."""
    manifests = Path(run_folder).glob(f"checkpoint-*/{MANIFEST}")
    found = [re.fullmatch(r"checkpoint-(\d+)", path.parent.name) for path in manifests]
    return sorted(int(match[1]) for match in found if match)


def _check_alike(manifest: Mapping[str, Any], agreement: Mapping[str, str], step: int) -> None:
    then = manifest["agreement"]
    differing = [key for key in sorted({*then, *agreement}) if key not in FREE and then.get(key) != agreement.get(key)]
    if differing:
        values = "; ".join(f"{key}: then {then.get(key)}, now {agreement.get(key)}" for key in differing)
        raise CheckpointError(f"checkpoint-{step} was made with other settings ({values})")


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
