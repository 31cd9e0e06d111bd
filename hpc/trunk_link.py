"""A client's end of its link with the trunk: hidden states of a batch's rows out, frames of the step in.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from hpc.errors import ProtocolError
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header
from hpc.link.inbox import Inbox, ReadingInbox
from hpc.link.kinds import Kind
from hpc.link.limits import WIDEST
from hpc.link.stats import LinkStats
from hpc.ragged import pack

_TRUNK = 0  # the inbox's name for its only peer
_REPLIES = (Kind.TRUNK_OUT, Kind.GRAD_SMASHED, Kind.EVAL_TRUNK_OUT)  # hidden states of the rows that were sent
_BETWEEN = (Kind.PAUSE, Kind.WELCOME)  # what the trunk may say whenever this client listens


class PauseAsked(Exception):
    """The trunk ends the run after `step` steps; whatever this client has begun of the next is void."""

    def __init__(self, step: int) -> None:
        super().__init__(step)
        self.step = step


class TrunkLink:
    """Sends and receives for one client."""

    def __init__(self, channel: Channel, *, client_id: int, device: torch.device, reads_ahead: bool) -> None:
        """`reads_ahead`: receive and open frames while this client computes."""
        self.channel, self._client_id, self._device = channel, client_id, device
        channel.limits.set(_REPLIES, 0)  # nothing was sent yet
        links = {_TRUNK: channel}
        # A channel's own deadline is what it waits for its peer (hpc.link.channel).
        self._inbox = ReadingInbox(links, timeout_s=channel.timeout_s) if reads_ahead else Inbox(links)
        self._aside: dict[tuple[Kind, int], Frame] = {}
        self.on_welcome: Callable[[Frame, Frame], None] = lambda told, key: None
        """Called when another client has come: who (WELCOME), and its signed key (PEER_KEY)."""

    def recv(self, kind: Kind, step: int, *, micro: int = 0, on_device: bool = True) -> Frame:
        """This frame of this step. Others of the step that come before it are put aside until they are asked for.

        Raises PauseAsked, ProtocolError for a frame of another step, or one that nobody will ask for, PeerLost, ...
        """
        while (kind, micro) not in self._aside:
            frame = self._listen(device=self._device if on_device else None)
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

    def recv_next(self, *kinds: Kind, patience_s: float | None = None) -> Frame:
        """The next frame, between steps, which may take `patience_s` instead of the usual. Raises PauseAsked."""
        return self._listen(*kinds, patience_s=patience_s)

    def _listen(self, *kinds: Kind, device: torch.device | None = None, patience_s: float | None = None) -> Frame:
        """The next frame that belongs to the work; what the trunk says in between is dealt with."""
        while True:
            due = kinds + _BETWEEN if kinds else ()
            frame = self._inbox.recv(_TRUNK, *due, device=device, patience_s=patience_s)
            if frame.header.kind is Kind.PAUSE:
                raise PauseAsked(frame.header.step)
            if frame.header.kind is not Kind.WELCOME:
                return frame
            self.on_welcome(frame, self._inbox.recv(_TRUNK, Kind.PEER_KEY))

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
        self.channel.limits.raise_to(_REPLIES, WIDEST * sum(lengths) * hidden_BTD.shape[-1])
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
