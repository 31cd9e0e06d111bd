"""Keep a library's chatter off the terminal, unless it fails: then everything it said is shown."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CHATTERERS = ("deepspeed", "DeepSpeed", "transformers", "torch.distributed", "bitsandbytes")


def hush() -> None:
    """Only errors of these libraries' loggers; some talk as soon as they are imported, so this comes before that."""
    for name in CHATTERERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet() -> Iterator[None]:
    """Holds back what this process and its children write to stdout and stderr, at the level of file descriptors."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(number) for number in (1, 2)]
    with tempfile.TemporaryFile() as held:
        try:
            for number in (1, 2):
                os.dup2(held.fileno(), number)
            yield
        except BaseException:
            _restore(kept)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            _restore(kept)
            for number in kept:
                os.close(number)


def _restore(kept: list[int]) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for number, copy in zip((1, 2), kept, strict=True):
        os.dup2(copy, number)
