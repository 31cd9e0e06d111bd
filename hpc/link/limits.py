"""The most bytes that a frame of each kind may bring, checked before any memory is taken for them.

A header may announce up to `frame.MAX_PAYLOAD`. Kinds that only tell something have a small limit from the start; for
those that carry tensors, whoever knows what is due sets one as soon as it knows.
"""

from __future__ import annotations

from collections.abc import Iterable

from hpc.config import MAX_ROWS
from hpc.errors import ProtocolError
from hpc.link.frame import MAX_ERROR_BYTES, MAX_PAYLOAD, Header
from hpc.link.kinds import Kind

WIDEST = 8  # bytes of an element of the widest dtype
SIGNED_KEY_BYTES = 8192
TOLD_BYTES = 2**20  # some numbers for each client of a run
_NOTHING = (Kind.ALIVE, Kind.BYE, Kind.VOTE, Kind.VERDICT, Kind.FORGET, Kind.ENOUGH, Kind.PAUSE)
_TOLD = (Kind.READY, Kind.WELCOME, Kind.ROSTER, Kind.ATTEST, Kind.TAGS, Kind.REVEAL)
_PER_ROW = (Kind.ROWS, Kind.REORDER)


class Limits:
    """Of one channel. Set by the thread that works, read by the one that receives."""

    def __init__(self) -> None:
        self._most = dict.fromkeys(Kind, MAX_PAYLOAD)
        self._most |= dict.fromkeys(_NOTHING, 0) | dict.fromkeys(_TOLD, TOLD_BYTES)
        self._most |= dict.fromkeys(_PER_ROW, WIDEST * MAX_ROWS)
        self._most |= {Kind.PEER_KEY: SIGNED_KEY_BYTES, Kind.ERROR: MAX_ERROR_BYTES}

    def set(self, kinds: Iterable[Kind], most: int) -> None:
        """From now on frames of these kinds bring at most so many bytes."""
        self._most |= dict.fromkeys(kinds, min(most, MAX_PAYLOAD))

    def raise_to(self, kinds: Iterable[Kind], most: int) -> None:
        """As `set`, where that is more than was allowed."""
        for kind in kinds:
            self.set((kind,), max(most, self._most[kind]))

    def check(self, header: Header, *, peer: str) -> None:
        """Raises ProtocolError for a header that announces more."""
        most = self._most[header.kind]
        if header.payload_bytes > most:
            raise ProtocolError(
                f"{peer} announces {header.payload_bytes} bytes of {header.kind.name}; at most {most} are allowed"
            )
