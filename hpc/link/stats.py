"""What a link carried, and where its time went."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace


@dataclass(kw_only=True)
class LinkStats:
    """Counts and wall seconds since the channel was made."""

    frames_sent: int = 0
    frames_received: int = 0
    payload_bytes_sent: int = 0
    payload_bytes_received: int = 0
    wire_bytes_sent: int = 0
    wire_bytes_received: int = 0
    seal_s: float = 0.0
    open_s: float = 0.0
    wire_s: float = 0.0
    """Waiting for chunks on their way, and for what was sent to be taken."""
    wait_s: float = 0.0
    """Waiting for a header: the peer was still at work."""

    def snapshot(self) -> LinkStats:
        """A copy that no longer changes."""
        return replace(self)

    def until(self, later: LinkStats) -> LinkStats:
        """What was added between this snapshot and `later`."""
        names = [field.name for field in fields(self)]
        return LinkStats(**{name: getattr(later, name) - getattr(self, name) for name in names})

    @classmethod
    def total(cls, many: Iterable[LinkStats]) -> LinkStats:
        """The sum over several links."""
        total, names = cls(), [field.name for field in fields(cls)]
        for one in many:
            for name in names:
                setattr(total, name, getattr(total, name) + getattr(one, name))
        return total
