"""torch's words for a broken connection → `PeerLost`, so that whoever waits says what it waited for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from hpc.errors import PeerLost

_BROKEN = re.compile(r"[Cc]onnection|[Tt]imed? ?out|[Bb]roken pipe|recv|NCCL|Wait timeout")


@contextmanager
def lost_if_broken(what: str) -> Iterator[None]:
    """Raise `PeerLost(what …)` for an error of torch.distributed that means a lost or silent peer."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or _BROKEN.search(str(error)):
            raise PeerLost(f"{what}: {str(error).strip().splitlines()[0][:160]}") from None
        raise
