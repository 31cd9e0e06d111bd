"""What each role of a run writes under `adapter/` at its end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from hpc.config import Config
from hpc.export.folder import write_folder
from hpc.export.layout import Layout
from hpc.export.origin import Origin
from hpc.export.portable import portable
from hpc.export.wire import receive_trunk_adapter
from hpc.trunk_link import TrunkLink

FOLDER = "adapter"

_log = logging.getLogger("hpc")


def save_client_adapter(
    folder: Path, config: Config, client_id: int, own: Mapping[str, torch.Tensor], link: TrunkLink
) -> None:
    """Write `adapter/client-<k>`: this client's parts (`own`, by the names of `Part.trainable()`) and its trunk's.

    Raises `ProtocolError` if the trunk sends anything else than that.
    """
    layout = Layout.of(config.model, config.adapter)
    values = portable(own) | receive_trunk_adapter(link, layout)
    _write(folder, f"client-{client_id}", config, layout, values)


def save_centralised_adapter(folder: Path, config: Config, trained: Mapping[str, torch.Tensor]) -> None:
    """Write `adapter/centralised`: what the uncut model learned."""
    _write(folder, "centralised", config, Layout.of(config.model, config.adapter), portable(trained))


def forget_adapter(run: Path, role: str) -> None:
    """A run that trains again has no adapter until its end: the one of an earlier end would pass for it."""
    shutil.rmtree(run / FOLDER / role, ignore_errors=True)


def _write(run: Path, role: str, config: Config, layout: Layout, values: Mapping[str, torch.Tensor]) -> None:
    """A run that has come so far does not fail for want of disk space."""
    target = run / FOLDER / role
    try:
        write_folder(target, values, Origin.of(config, role), layout)
    except OSError as error:
        _log.warning("%s was not written: %s. Export from a checkpoint (launch/export.py)", target, error)
