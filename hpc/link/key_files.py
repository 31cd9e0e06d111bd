"""The files of identities: private from their first moment, never replaced by accident, not for others to change."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from hpc.errors import IdentityError

_OTHERS_WRITE, _OTHERS_READ = 0o022, 0o055

_log = logging.getLogger("hpc.link")


def require_unwritable(path: Path) -> None:
    """As sshd does: raises IdentityError if others than the owner may change this file or folder, if it is there."""
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return
    if mode & _OTHERS_WRITE:
        raise IdentityError(
            f"{path} can be changed by others (mode {mode:04o}), who could put keys of their own there; "
            f"run: chmod go-w {path}"
        )


@cache
def warn_if_open(folder: Path) -> None:
    """Once for each folder: its private keys are closed themselves, but that is all that protects them."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & _OTHERS_READ:
        _log.warning("%s, with private keys, is open to others (mode %04o); run: chmod 700 %s", folder, mode, folder)


def make_folder(folder: Path) -> None:
    """Mode 0700 if it is made. Raises IdentityError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(f"{folder} cannot be made ({error.strerror}); choose another --link.keys_dir") from None


def create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that nobody sees half-written, with `mode` from its first moment. Raises IdentityError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.link(draft, path)  # fails, rather than replaces, if the file exists
        finally:
            draft.unlink()
    except FileExistsError:
        raise IdentityError(f"{path} exists and stays as it is") from None
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from None


def replace(path: Path, data: bytes, mode: int) -> None:
    """As `create`, in the place of what was there. Raises IdentityError."""
    fresh = path.with_name(f".{path.name}.new.{os.getpid()}")
    create(fresh, data, mode)
    try:
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise IdentityError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks. Raises IdentityError if it cannot be written."""
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise IdentityError(f"{folder} cannot be written ({error.strerror}); choose another --link.keys_dir") from None
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
