"""One consistent cut of a run at a step boundary: every role's file, and a manifest that is committed last.

`<run folder>/checkpoint-<step>/<role>.safetensors` and `manifest.json`. A checkpoint without a manifest was not
finished and does not exist. Each role writes and reads its own file only, so client parts never leave a client. Batches
and dropout are functions of the step, so parameters, optimiser state, loss scale and the step are all there is.

Every file says whose it is: role, step, the attempt that wrote it, and a digest of what it holds. So a file that was
cut short, altered, or put in from another step or run is found out on the role's own disc, without a manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hpc.errors import CheckpointError

MANIFEST = "manifest.json"
ELSE = "resume from another checkpoint (--run.resume_from_checkpoint checkpoint-<step>)"
_STAMP = "stamp"  # key of the metadata beside the facts


@dataclass(kw_only=True, frozen=True)
class Attempt:
    """One start of a run: a run that was resumed has had several. Files of two attempts do not mix."""

    name: str = ""
    takes_up: str = ""
    """The attempt that wrote the checkpoint which this one goes on from."""


UNNAMED = Attempt()


@dataclass(kw_only=True, frozen=True)
class Stamp:
    """What a role's file says about itself."""

    role: str
    step: int
    attempt: str
    sha256: str
    """Of names, dtypes, shapes, bytes and facts."""


def checkpoint_folder(run_folder: str | Path, step: int) -> Path:
    return Path(run_folder) / f"checkpoint-{step}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1 for another folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def write_role(
    run_folder: str | Path,
    step: int,
    role: str,
    tensors: Mapping[str, torch.Tensor],
    facts: Mapping[str, float],
    *,
    attempt: str = "",
) -> None:
    """Write one role's state, whole or not at all. Raises `OSError` (disc full, no permission); no draft is left."""
    folder = checkpoint_folder(run_folder, step)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{role}.{os.getpid()}"
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    told = {name: float(value).hex() for name, value in facts.items()}
    stamp = Stamp(role=role, step=step, attempt=attempt, sha256=_digest(copies, told))
    try:
        save_file(copies, draft, metadata={**told, _STAMP: json.dumps(asdict(stamp))})
        to_disk(draft)
        draft.replace(folder / f"{role}.safetensors")
        to_disk(folder)
    except SafetensorError as error:  # its way to say ENOSPC
        raise OSError(str(error)) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def read_role(
    folder: Path, role: str, *, attempt: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One role's state, if it is what was written.

    Raises `CheckpointError` if the file is missing, broken or altered, or if it belongs to another role, another step
    or (unless `attempt` is None) to another attempt than the checkpoint's.
    """
    path = folder / f"{role}.safetensors"
    stamp = read_stamp(path)
    require_own(path, stamp, role=role, step=step_of(folder), attempt=attempt)
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        told = {name: value for name, value in file.metadata().items() if name != _STAMP}
    if _digest(tensors, told) != stamp.sha256:
        raise CheckpointError(f"{path} was altered: its content does not fit its digest; {ELSE}")
    return tensors, {name: float.fromhex(value) for name, value in told.items()}


def read_stamp(path: Path) -> Stamp:
    """What the file says about itself; its length is checked, its content is not read. Raises `CheckpointError`."""
    with _opened(path) as file:
        try:
            return Stamp(**json.loads((file.metadata() or {})[_STAMP]))
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path} does not say what it belongs to; {ELSE}") from None


def require_own(path: Path, stamp: Stamp, *, role: str, step: int, attempt: str | None) -> None:
    """Raise `CheckpointError` with both values if the file belongs elsewhere."""
    for what, due, found in (("role", role, stamp.role), ("step", step, stamp.step)):
        if due != found:
            raise CheckpointError(f"{path} belongs to {what} {found}, not {due}; {ELSE}")
    if attempt is not None and attempt != stamp.attempt:
        raise CheckpointError(
            f"{path} was written by another run, or another attempt of it ({stamp.attempt or 'unnamed'}), than the "
            f"checkpoint's manifest ({attempt or 'unnamed'}); {ELSE}"
        )


def tensor_names(path: Path) -> set[str]:
    """What is in a role's file. Raises `CheckpointError`."""
    with _opened(path) as file:
        return set(file.keys())


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; {ELSE}") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {ELSE}") from None


def _digest(tensors: Mapping[str, torch.Tensor], told: Mapping[str, str]) -> str:
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def commit(
    run_folder: str | Path,
    step: int,
    agreement: Mapping[str, str],
    *,
    attempt: str = "",
    clients: Sequence[int] | None = None,
    after: float = 0.0,
) -> None:
    """Make the checkpoint exist. Call when every role has written its file. Raises `OSError`.

    The manifest names the files that this role can see: all where the folder is shared, else only its own. `clients`:
    those who have written theirs; None: all. `after`: Unix time of the last commit, maybe by the clock of another
    host, which may be ahead of this one's.
    """
    folder = checkpoint_folder(run_folder, step)
    manifest = {
        "step": step,
        "attempt": attempt,
        "committed": max(time.time(), after + 1e-3),
        "files": _files_of(folder, step, attempt),
        "agreement": dict(agreement),
        **({} if clients is None else {"clients": list(clients)}),
    }
    draft = folder / f".{MANIFEST}.{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_text(json.dumps(manifest, indent=1))
        to_disk(draft)
        draft.replace(folder / MANIFEST)
        to_disk(folder)
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _files_of(folder: Path, step: int, attempt: str) -> list[str]:
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(CheckpointError):  # an earlier attempt's: of no concern
            require_own(path, read_stamp(path), role=path.stem, step=step, attempt=attempt)
            found.append(path.name)
    return found


def to_disk(path: Path) -> None:
    """Let a file's content, or a folder's entries, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
