"""Links over MPI: pairs of ranks on a communicator of their own. Fast on one host and on fabrics.

An MPI job does not survive a dead rank; where clients may come and go, use Gloo.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from hpc.errors import PeerLost, TamperError, TopologyError
from hpc.link.frame import payload_view
from hpc.link.mpi_library import load_mpi
from hpc.link.transport import Pending, lost

if TYPE_CHECKING:
    from mpi4py import MPI

_TAG = 77
_MAX_COUNT = 2**30  # bytes in one call; MPI's counts are 32 bits
_HOT_S = 200e-6  # poll without sleeping this long: an answer over shared memory comes within it
_LONGEST_NAP_S = 500e-6
_IDLE_S = 0.1  # after so long a wait, longer naps: some threads wait for most of the time
_LONGEST_IDLE_NAP_S = 2e-3
_abandoned: list[memoryview] = []  # memory of cancelled operations, which MPI might still touch


def link_communicator() -> MPI.Intracomm:
    """A duplicate of MPI's world, so that links cannot meet other traffic. Collective: every rank calls it once.

    Raises TopologyError if MPI is not installed or has a single rank.
    """
    MPI = load_mpi()
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise TopologyError("this MPI does not let threads receive while others send; use --link.transport gloo")
    if MPI.COMM_WORLD.Get_size() < 2:
        raise TopologyError(
            "--link.transport mpi found a single MPI rank; launch with mpirun -n N, and if you did, "
            f"{MPI.Get_library_version().splitlines()[0][:60]!r} is not that mpirun's library: name it in MPI4PY_LIBMPI"
        )
    return MPI.COMM_WORLD.Dup()


class _MpiPending:
    def __init__(self, requests: list[Any], view: memoryview, peer: str) -> None:
        # MPI works on raw memory: the view keeps it alive as long as the requests.
        self._requests, self._view, self._peer = requests, view, peer

    def wait(self, timeout_s: float, what: str = "a message") -> None:
        start, nap = time.monotonic(), 10e-6
        while not self._done():
            waited = time.monotonic() - start
            if waited > timeout_s:
                self.cancel()
                raise lost(self._peer, what, waited, "silent")
            if waited > _HOT_S:  # MPI would spin; an idle rank leaves the core to the others
                time.sleep(nap)
                nap = min(2 * nap, _LONGEST_IDLE_NAP_S if waited > _IDLE_S else _LONGEST_NAP_S)

    def cancel(self) -> None:
        if self._requests:
            _abandoned.append(self._view)
        for request in self._requests:
            request.Cancel()
            request.Free()
        self._requests = []

    def _done(self) -> bool:
        from mpi4py import MPI

        try:
            while self._requests and self._requests[0].Test():
                self._requests.pop(0)
        except MPI.Exception as error:
            self._requests = []
            if error.Get_error_class() == MPI.ERR_TRUNCATE:
                raise TamperError(f"{self._peer} sent more bytes than were due") from None
            raise PeerLost(f"{self._peer}: MPI reports {error.Get_error_string()}") from None
        return not self._requests


class MpiTransport:
    """This rank's end of its link with rank `other` of `communicator`."""

    name = "mpi"
    short_messages = True

    def __init__(self, communicator: MPI.Intracomm, *, other: int, peer: str) -> None:
        self._communicator, self._other, self.peer = communicator, other, peer
        self._receives: list[_MpiPending] = []
        self._closed = False

    def send(self, buffer: torch.Tensor) -> Pending:
        self._check_open()
        view = payload_view(buffer)
        parts = _parts(view)
        return _MpiPending([self._communicator.Isend(part, self._other, _TAG) for part in parts], view, self.peer)

    def recv(self, buffer: torch.Tensor) -> Pending:
        self._check_open()
        view = payload_view(buffer)
        parts = _parts(view)
        pending = _MpiPending([self._communicator.Irecv(part, self._other, _TAG) for part in parts], view, self.peer)
        self._receives = [each for each in self._receives if each._requests]
        self._receives.append(pending)
        return pending

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for pending in self._receives:
                pending.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise PeerLost(f"{self.peer}: this end has closed the link")


def _parts(view: memoryview) -> list[list[Any]]:
    """The buffer in MPI's form, cut below the 32-bit limit; both ends cut alike."""
    from mpi4py import MPI

    cuts = range(0, max(len(view), 1), _MAX_COUNT)
    return [[part := view[cut : cut + _MAX_COUNT], len(part), MPI.BYTE] for cut in cuts]
