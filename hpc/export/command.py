"""`launch/export.py`: from a run's folder to a PEFT folder, or with `merge` to a whole model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from hpc.errors import ConfigError
from hpc.export.folder import write_folder
from hpc.export.merge import require_mergeable, write_merged
from hpc.export.peft_form import has_peft_form
from hpc.export.pick import Picked, pick
from hpc.quiet import quiet


def export(
    run: Path, output: Path, *, client: int | None, checkpoint: str | None, merge: bool, dtype: str | None
) -> str:
    """Write `output`, whole or not at all; returns a line that says what it is and how to load it.

    Raises `BadInput` errors that name what is missing, broken or impossible.
    """
    check_output(output)
    if dtype is not None and not merge:
        raise ConfigError(f"--dtype {dtype} is for --merge; an adapter is kept in float32")
    picked = pick(run, client, checkpoint)
    origin = picked.origin
    if merge:
        require_mergeable(origin)
    else:
        _require_peft_form(picked)
    try:
        if merge:
            _write_whole_model(output, picked, getattr(torch, dtype or origin.model.dtype))
        else:
            write_folder(output, picked.values, origin, picked.layout)
    except OSError as error:
        raise ConfigError(f"--output_dir {output} was not written: {error}") from None
    if merge:
        return f"{output}: the whole model of {origin.role}; AutoModelForCausalLM.from_pretrained loads it"
    return (
        f"{output}: the adapter of {origin.role} for {origin.model.name_or_path}; "
        "peft.PeftModel.from_pretrained(base_model, folder) loads it"
    )


def check_output(output: Path) -> None:
    """Raise `ConfigError` unless `output` is new or an empty folder that can be written."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output_dir {output} is not empty; choose another one, nothing is overwritten")
    nearest = next(parent for parent in [output, *output.absolute().parents] if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"--output_dir {output} cannot be written: {nearest} is no folder that you may write to")


def _require_peft_form(picked: Picked) -> None:
    adapter = picked.layout.adapter
    if has_peft_form(picked.layout):
        return
    if adapter.method == "full":
        raise ConfigError("--adapter.method full changed the weights themselves, so there is no adapter; add --merge")
    raise ConfigError(
        f"--adapter.parts {' '.join(adapter.parts)} gives only some blocks a prefix, and PEFT's prefix tuning gives "
        "one to every block; such a run can be evaluated by this project only"
    )


def _write_whole_model(output: Path, picked: Picked, dtype: torch.dtype) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    drafts = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        adapter, model = drafts / "adapter", drafts / "model"
        if has_peft_form(picked.layout):
            write_folder(adapter, picked.values, picked.origin, picked.layout)
        with quiet():  # progress bars
            write_merged(model, adapter, picked.values, picked.origin, dtype)
        model.replace(output)  # over nothing, or over an empty folder
    finally:
        shutil.rmtree(drafts, ignore_errors=True)
