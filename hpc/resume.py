"""Which checkpoint a run goes on from: the last whole one, made with settings that it may go on with."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.checkpoint import ELSE, MANIFEST, checkpoint_folder, read_stamp, require_own, step_of
from hpc.errors import CheckpointError

LATEST = "latest"


@dataclass(kw_only=True, frozen=True)
class Found:
    """The checkpoint to go on from."""

    step: int
    attempt: str
    """Who wrote it; every file of it must say the same."""
    clients: tuple[int, ...] | None = None
    """Those who have a file in it; None: all of the run."""
    passed_over: tuple[str, ...] = ()
    """Newer ones that are not whole, each with the reason."""

    def __str__(self) -> str:
        told = f"going on from checkpoint-{self.step}"
        return f"{told}; passed over {'; '.join(self.passed_over)}" if self.passed_over else told


def find(run_folder: str | Path, which: str, agreement: Mapping[str, str], *, steps: float = math.inf) -> Found:
    """The checkpoint to go on from: `latest`, or the name of a checkpoint folder in the run's folder.

    `latest` is the one committed last of those that are whole as far as this folder shows; a role that keeps its file
    elsewhere finds out for itself when it reads it. `steps`: those of the whole run. Raises `CheckpointError` if there
    is none, if it is not whole, was made with other settings (both values are named), or lies beyond `steps`.
    """
    wanted = re.fullmatch(r"(?:.*/)?checkpoint-(\d+)/?", which)
    if which != LATEST and wanted is None:
        raise CheckpointError(f"--run.resume_from_checkpoint {which} must be latest or checkpoint-<step>")
    if os.path.dirname(which.rstrip("/")) and Path(which).parent.resolve() != Path(run_folder).resolve():
        raise CheckpointError(
            f"--run.resume_from_checkpoint {which} lies in another folder than the run's, {run_folder}; give that "
            "folder as --run.output_dir"
        )
    committed = committed_steps(run_folder)
    if wanted is not None and int(wanted[1]) in committed:
        step = int(wanted[1])
        passed_over: list[str] = []
        if (why := fault(run_folder, step)) is not None:
            raise CheckpointError(f"checkpoint-{step} is not whole: {why}")
    else:
        step, passed_over = _last_whole(run_folder, committed if wanted is None else [])
    if step < 0:
        have = ", ".join(f"checkpoint-{step}" for step in committed) or "no finished checkpoint"
        why = "".join(f"; {reason}" for reason in passed_over)
        raise CheckpointError(f"--run.resume_from_checkpoint {which}: {run_folder} holds {have}{why}")
    manifest = _manifest(run_folder, step)
    _require_alike(manifest["agreement"], agreement, step)
    if step > steps:
        raise CheckpointError(
            f"checkpoint-{step} lies beyond the {steps} steps that the run is to have; give more --train.max_steps (or "
            "--train.rounds), or resume from an earlier checkpoint"
        )
    clients = manifest["clients"]
    return Found(
        step=step,
        attempt=manifest["attempt"],
        clients=None if clients is None else tuple(clients),
        passed_over=tuple(passed_over),
    )


def committed_steps(run_folder: str | Path) -> list[int]:
    """Steps of the finished checkpoints in the order in which they were committed; whole or not.

    A run that went back to an earlier checkpoint commits the same steps again, so the highest need not be the last.
    """
    steps = [step_of(path.parent) for path in Path(run_folder).glob(f"checkpoint-*/{MANIFEST}")]
    return sorted((step for step in steps if step >= 0), key=lambda step: (_committed_at(run_folder, step), step))


def last_commit(run_folder: str | Path) -> float:
    """Unix time of the newest commit, by the clock of whoever made it; 0 if there is none."""
    told = (_committed_at(run_folder, step) for step in committed_steps(run_folder))
    return max((at for at in told if math.isfinite(at)), default=0.0)


def fault(run_folder: str | Path, step: int) -> str | None:
    """Why this committed checkpoint cannot be used, as far as this folder shows; None if it is whole.

    The files that the manifest names must be there, as long as they say they are, and of this checkpoint.
    """
    folder = checkpoint_folder(run_folder, step)
    try:
        manifest = _manifest(run_folder, step)
        for name in manifest["files"]:
            path = folder / name
            require_own(path, read_stamp(path), role=path.stem, step=step, attempt=manifest["attempt"])
    except CheckpointError as error:
        return str(error).removesuffix(f"; {ELSE}")
    return None


def _last_whole(run_folder: str | Path, committed: Sequence[int]) -> tuple[int, list[str]]:
    """Its step (-1: none), and what is newer but not whole."""
    passed_over: list[str] = []
    for step in reversed(committed):
        why = fault(run_folder, step)
        if why is None:
            return step, passed_over + _unfinished(run_folder, beyond=step)
        passed_over.append(f"checkpoint-{step}: {why}")
    return -1, passed_over + _unfinished(run_folder, beyond=-1)


def _unfinished(run_folder: str | Path, *, beyond: int) -> list[str]:
    folders = Path(run_folder).glob("checkpoint-*")
    steps = sorted(step_of(folder) for folder in folders if not (folder / MANIFEST).exists())
    return [f"checkpoint-{step}: it has no {MANIFEST}, so it was not finished" for step in steps if step > beyond]


def _manifest(run_folder: str | Path, step: int) -> dict[str, Any]:
    path = checkpoint_folder(run_folder, step) / MANIFEST
    try:
        found = json.loads(path.read_text())
        if found["step"] != step:
            raise CheckpointError(f"{path} belongs to step {found['step']}, not {step}")
        whole = {key: found[key] for key in ("step", "attempt", "committed", "files", "agreement")}
        return {**whole, "clients": found.get("clients")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error!r})") from None


def _committed_at(run_folder: str | Path, step: int) -> float:
    """Unix time; a broken manifest counts as the newest, so that it is named when it is passed over."""
    try:
        return float(_manifest(run_folder, step)["committed"])
    except CheckpointError:
        return math.inf


def _require_alike(then: Mapping[str, str], now: Mapping[str, str], step: int) -> None:
    differing = [key for key in sorted({*then, *now}) if then.get(key) != now.get(key)]
    if differing:
        values = "; ".join(f"{key}: then {then.get(key)}, now {now.get(key)}" for key in differing)
        raise CheckpointError(f"checkpoint-{step} was made with other settings ({values})")
