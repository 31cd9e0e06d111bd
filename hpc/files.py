"""Files that others meet whole or not at all, and locks that end with their holder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there at the end takes the place of `path` at once.

    Whoever fails, or writes nothing, leaves the old file as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield draft
        if draft.exists():
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def try_lock(file: IO[str]) -> bool:
    """Take the file's lock if nobody has it. It ends with the process, and with all that were given the open file.

    Raises `OSError` where the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
