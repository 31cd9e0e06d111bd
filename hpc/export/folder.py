"""An adapter as a folder: what plain `PeftModel.from_pretrained` loads, or the tensors alone where PEFT has no form.

`adapter_config.json` and `adapter_model.safetensors`, or `trained.safetensors`; and `export.json` (see
`hpc.export.origin`). Only the owner may read the files: they are one client's own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hpc.errors import CheckpointError
from hpc.export.layout import Layout, misfit
from hpc.export.origin import Origin
from hpc.export.peft_form import TABLE, has_peft_form, join_tables, peft_config, split_table
from hpc.export.portable import PARTS

WEIGHTS, TRAINED = "adapter_model.safetensors", "trained.safetensors"


def write_folder(folder: Path, values: Mapping[str, torch.Tensor], origin: Origin, layout: Layout) -> None:
    """Write what learned (portable names), whole or not at all; what was in `folder` is replaced.

    Raises `CheckpointError` for tensors that are not this adapter's, `OSError` where it cannot be written.
    """
    check_values(values, layout, str(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(mode=0o700)
    try:
        _fill(draft, values, origin, layout)
    except SafetensorError as error:  # its way to say ENOSPC
        raise OSError(str(error)) from None
    else:
        for path in draft.iterdir():
            path.chmod(0o600)
        draft.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _fill(draft: Path, values: Mapping[str, torch.Tensor], origin: Origin, layout: Layout) -> None:
    if not has_peft_form(layout):
        save_file(dict(values), draft / TRAINED, metadata={"format": "pt"})
    else:
        peft_config(layout, origin.model.name_or_path).save_pretrained(draft)
        tensors = {TABLE: join_tables(values)} if layout.adapter.method == "p_tuning_v2" else dict(values)
        save_file(tensors, draft / WEIGHTS, metadata={"format": "pt"})
    origin.write(draft)


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], Origin, Layout]:
    """What `write_folder` wrote. Raises `CheckpointError` for a folder that is not whole, or not what it says it is."""
    origin = Origin.read(folder)
    layout = Layout.of(origin.model, origin.adapter)
    origin.require_model(f"{folder}")
    name = WEIGHTS if has_peft_form(layout) else TRAINED
    try:
        values = load_file(folder / name)
    except FileNotFoundError:
        raise CheckpointError(f"{folder} lacks {name}; copy it from the run again") from None
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / name} is not whole ({error}); copy it from the run again") from None
    if TABLE in values and layout.adapter.method == "p_tuning_v2":
        values = split_table(values, layout)
    check_values(values, layout, str(folder / name))
    return values, origin, layout


def check_values(values: Mapping[str, torch.Tensor], layout: Layout, what: str) -> None:
    """Raise `CheckpointError` if these (portable names) are not what learns in `layout`."""
    fault = misfit({name: tuple(value.shape) for name, value in values.items()}, layout, PARTS)
    if fault is not None:
        raise CheckpointError(f"{what} does not fit this model, cut and adapter: {fault}")
