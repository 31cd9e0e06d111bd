"""Links over NCCL: both ends have a GPU of their own. Ciphertext is staged through pinned memory into GPU buffers.

Two groups of two ranks, one for each direction: a group runs its operations in order on one stream, so a send
behind a receive that still waits would wait with it.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hpc.errors import PeerLost, TopologyError
from hpc.link.transport import Pending, lost

SERVER, CLIENT = 0, 1  # ranks of a link
_LONGEST_NAP_S = 500e-6


def require_nccl() -> None:
    """Raises TopologyError where torch has no NCCL or no GPU is visible."""
    if not dist.is_nccl_available():
        raise TopologyError("--link.transport nccl: this torch was built without NCCL; use --link.transport gloo")
    if not torch.cuda.is_available():
        raise TopologyError("--link.transport nccl: no GPU is visible; use --link.transport gloo")


class _NcclSend:
    def __init__(self, work: dist.Work, staged: torch.Tensor, peer: str) -> None:
        self._work, self._staged, self._peer = work, staged, peer

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        _wait(self._work, timeout_s, self._peer, what)


class _NcclReceive:
    """Starts only in `wait`: a posted receive would hold the GPU's stream while nobody needs it."""

    def __init__(self, owner: NcclTransport, buffer: torch.Tensor) -> None:
        self._owner, self._buffer = owner, buffer

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        self._owner.receive_now(self._buffer, timeout_s, what)


class NcclTransport:
    """One end of a link between two GPUs. Waits of receives must come in the order of `recv`, as a channel's do."""

    name = "nccl"
    short_messages = False

    # The groups are ProcessGroupNCCL, a name that torch has only in its CUDA builds.
    def __init__(self, outgoing: Any, incoming: Any, *, rank: int, device: torch.device, peer: str) -> None:
        self._groups: tuple[Any, Any] | None = (outgoing, incoming)
        self._other, self._device, self.peer = 1 - rank, device, peer

    def send(self, buffer: torch.Tensor) -> Pending:
        staged = buffer.to(self._device)
        try:
            work = self._open()[0].send([staged], self._other, 0)
        except RuntimeError as error:
            raise _failed(self.peer, error) from None
        return _NcclSend(work, staged, self.peer)

    def recv(self, buffer: torch.Tensor) -> Pending:
        self._open()
        return _NcclReceive(self, buffer)

    def receive_now(self, buffer: torch.Tensor, timeout_s: float, what: str) -> None:
        staged = torch.empty(buffer.shape, dtype=torch.uint8, device=self._device)
        try:
            work = self._open()[1].recv([staged], self._other, 0)
        except RuntimeError as error:
            raise _failed(self.peer, error) from None
        _wait(work, timeout_s, self.peer, what)
        buffer.copy_(staged)

    def close(self) -> None:
        groups, self._groups = self._groups, None
        for group in groups or ():
            group.abort()

    def _open(self) -> tuple[Any, Any]:
        if self._groups is None:
            raise PeerLost(f"{self.peer}: this end has closed the link")
        return self._groups


def connect_nccl(
    store: dist.Store, *, client_id: int, rank: int, device: torch.device, timeout_s: float, peer: str, epoch: int = 0
) -> NcclTransport:
    """Meet the other end of client `client_id`'s link in `store`; `rank` is SERVER or CLIENT.

    Raises TopologyError without NCCL or GPU, PeerLost after `timeout_s` seconds.
    """
    require_nccl()
    groups = []
    for sender in (SERVER, CLIENT):
        prefix = dist.PrefixStore(f"link/{client_id}/{epoch}/from-{sender}", store)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)
        try:
            groups.append(dist.ProcessGroupNCCL(prefix, rank, 2, options))
        except RuntimeError as error:
            raise _failed(peer, error) from None
    return NcclTransport(groups[rank], groups[1 - rank], rank=rank, device=device, peer=peer)


def _wait(work: dist.Work, timeout_s: float, peer: str, what: str) -> None:
    """Poll, since NCCL's own wait would only order streams; then this host knows that the bytes are there."""
    start, nap = time.monotonic(), 10e-6
    try:
        while not work.is_completed():
            waited = time.monotonic() - start
            if waited > timeout_s:
                raise lost(peer, what, waited, "silent")
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)
        work.wait()
    except RuntimeError as error:
        raise _failed(peer, error) from None


def _failed(peer: str, error: RuntimeError) -> PeerLost:
    text = str(error)
    return PeerLost(f"{peer}: NCCL reports {text.splitlines()[0][:160] if text else 'an error'}")
