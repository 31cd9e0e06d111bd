"""DeepSpeed's compiled operator, loaded so that no other process can make this one wait for ever.

PyTorch guards the build of an extension by a file whose mere existence means "busy": a process that is killed while
building leaves it behind, and everybody after it waits without end. Here a kernel lock, which dies with its holder,
decides who builds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from hpc.errors import HpcError
from hpc.files import try_lock
from hpc.source.cache import cache_root

FOLDER = "TORCH_EXTENSIONS_DIR"  # PyTorch's own variable
PATIENCE_S = 600.0  # a build takes a minute or two on a busy machine
POLL_S = 0.2

_log = logging.getLogger("hpc")


def load_operator() -> None:
    """Build DeepSpeed's CPU operator, or load it. Raises `HpcError` if another process builds it without end."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    folder = operator_folder()
    os.environ.setdefault(FOLDER, str(folder))
    with _only_one(folder) as alone:
        builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
        if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
            return
        if alone:
            for left in folder.rglob(f"{builder.NAME}/lock"):  # nobody holds the kernel lock, so nobody builds
                left.unlink()
        builder.load()


def operator_folder() -> Path:
    """Where the operator is built: PyTorch's own variable says, or one folder for each installation.

    The build names the paths of its headers, so another installation's would be built anew.
    """
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    import torch

    library = find_spec("deepspeed")  # without importing it, which takes seconds
    about = f"{library.origin if library else None} {torch.__version__}"
    return cache_root() / "extensions" / hashlib.sha256(about.encode()).hexdigest()[:12]


@contextmanager
def _only_one(folder: Path) -> Iterator[bool]:
    """Wait for the lock; False where the file system has no locks. Raises `HpcError` past the deadline."""
    deadline = time.monotonic() + PATIENCE_S
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".building").open("w")
    except OSError as error:
        raise HpcError(
            f"{folder} cannot be written ({error}); set {FOLDER} or HPC_CACHE to a folder that can"
        ) from None
    with file:
        while True:
            try:
                if try_lock(file):
                    break
            except OSError as error:  # some network file systems
                _log.warning("%s has no locks (%s): if another process was killed here, delete its lock", folder, error)
                yield False
                return
            if time.monotonic() > deadline:
                raise HpcError(f"another process has been building in {folder} for {PATIENCE_S:.0f} s; end it")
            time.sleep(POLL_S)
        yield True
