"""The store that the roles of a run meet in, over TCP."""

from __future__ import annotations

import queue
import threading
from datetime import timedelta

import torch.distributed as dist

from hpc.errors import PeerLost

_SLACK_S = 1.0  # torch ends by itself at its deadline if nobody listens


def join_tcp_store(host: str, port: int, *, timeout_s: float) -> dist.Store:
    """The store that another process has at `host` and `port`. Raises PeerLost after `timeout_s` seconds.

    In a thread of its own: torch has a deadline for the connection, but none for the answer, so it would wait for ever
    at a port where something else listens.
    """
    made: queue.Queue[dist.Store | RuntimeError] = queue.Queue()

    def join() -> None:
        try:
            made.put(dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=timeout_s)))
        except RuntimeError as error:
            made.put(error)

    threading.Thread(target=join, name="store", daemon=True).start()
    try:
        found = made.get(timeout=timeout_s + _SLACK_S)
    except queue.Empty:
        found = RuntimeError("no answer")
    if isinstance(found, RuntimeError):
        raise PeerLost(f"nobody answers at {host}:{port} after {timeout_s:g} s: is trunk rank 0 running?")
    return found
