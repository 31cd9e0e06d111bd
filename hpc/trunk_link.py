"""A client's end of its link with the trunk: hidden states of a batch's rows out, frames of the step in.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpc.errors import ProtocolError
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header
from hpc.link.inbox import Inbox, ReadingInbox
from hpc.link.kinds import Kind
from hpc.link.stats import LinkStats
from hpc.ragged import pack

_TRUNK = 0  # the inbox's name for its only peer


class TrunkLink:
    """Sends and receives for one client."""

    def __init__(self, channel: Channel, *, client_id: int, device: torch.device, reads_ahead: bool) -> None:
        """`reads_ahead`: receive and open frames while this client computes."""
        self.channel, self._client_id, self._device = channel, client_id, device
        links = {_TRUNK: channel}
        # A channel's own deadline is what it waits for its peer (hpc.link.channel).
        self._inbox = ReadingInbox(links, timeout_s=channel.timeout_s) if reads_ahead else Inbox(links)
        self._aside: dict[tuple[Kind, int], Frame] = {}

    def recv(self, kind: Kind, step: int, *, micro: int = 0, on_device: bool = True) -> Frame:
        """This frame of this step. Others of the step that come before it are put aside until they are asked for.

        Raises ProtocolError for a frame of another step, or one that nobody will ask for, PeerLost, and so on.
        """
        while (kind, micro) not in self._aside:
            frame = self._inbox.recv(_TRUNK, device=self._device if on_device else None)
            header = frame.header
            if header.step != step:
                raise ProtocolError(f"the trunk sent {header.kind.name} of step {header.step}, not {step}")
            if (
                header.kind not in (kind, Kind.TRUNK_OUT, Kind.GRAD_SMASHED)
                or (header.kind, header.micro) in self._aside
            ):
                raise ProtocolError(f"the trunk sent {header.kind.name} where {kind.name} was due")
            self._aside[header.kind, header.micro] = frame
        return self._aside.pop((kind, micro))

    def recv_next(self, *kinds: Kind) -> Frame:
        """The next frame, between steps."""
        return self._inbox.recv(_TRUNK, *kinds)

    def send(self, header: Header, tensor: torch.Tensor | None = None) -> None:
        self.channel.send(header, tensor)

    def send_rows(
        self,
        kind: Kind,
        step: int,
        hidden_BTD: torch.Tensor,
        lengths: Sequence[int],
        *,
        micro: int = 0,
        weight: float = 0.0,
        flags: int = 0,
        sent: Sequence[int] | None = None,
        layout: Sequence[int] = (),
    ) -> None:
        """Hidden states of rows of `lengths` valid tokens, without their padding.

        `sent`: the lengths of those rows that are in `hidden_BTD`, where the server's cache has the others.
        """
        header = Header(
            kind=kind,
            step=step,
            micro=micro,
            lengths=tuple(lengths),
            layout=tuple(layout),
            weight=weight,
            flags=flags,
        )
        self.channel.send(header, pack(hidden_BTD, lengths if sent is None else sent))

    def stats(self) -> LinkStats:
        """`wait_s` is the time in which this client had nothing to do but wait for the trunk."""
        total = self.channel.stats
        total.wait_s = self._inbox.waited_s
        return total
