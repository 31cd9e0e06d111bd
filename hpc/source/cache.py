"""Model folders that are made once and kept: whole or not there at all, also with several processes at work."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from hpc.errors import ModelError


def cache_root() -> Path:
    """`$HPC_CACHE`, or `hpc-flglm` in the user's cache folder. Raises `ModelError` if there is no such user."""
    chosen = os.environ.get("HPC_CACHE")
    try:
        return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "hpc-flglm"
    except RuntimeError:  # no HOME, and a user whom this host does not know
        raise ModelError("there is no home folder to keep models in; set HPC_CACHE to a folder") from None


def cached_folder(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `build(folder)` fills it the first time.

    It is built beside its place and renamed, so nobody sees half a folder. Two processes may build at once: the
    first rename wins and the other one's copy, which is the same, is thrown away.

    Raises `ModelError` if the cache folder cannot be written.
    """
    target = cache_root() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    except OSError as error:
        raise ModelError(f"the cache folder {target.parent} cannot be written ({error}); set HPC_CACHE") from None
    try:
        building.chmod(0o755)  # mkdtemp's 0700 would lock out others who share the cache
        build(building)
        _rename_unless_there(building, target)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return target


def _rename_unless_there(building: Path, target: Path) -> None:
    try:
        building.rename(target)
    except OSError:
        if not target.is_dir():
            raise
