"""A trunk rank's clients: what they send, checked; what is sent to them; and who is lost.

Shape suffixes: S all valid tokens of one frame, D hidden size.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence

import torch

from hpc.acts import Lost, Micro, Recv
from hpc.config import MAX_ROWS, Config
from hpc.errors import LinkError, PeerLost, ProtocolError
from hpc.link.channel import Channel
from hpc.link.frame import Frame, Header
from hpc.link.inbox import Inbox, ReadingInbox
from hpc.link.kinds import Kind
from hpc.link.limits import WIDEST
from hpc.link.stats import LinkStats
from hpc.ragged import split_rows
from hpc.report.events import EventLog

HIDDEN_STATES = (Kind.SMASHED, Kind.GRAD_TRUNK_OUT, Kind.EVAL_SMASHED)
TRAINED = (Kind.SMASHED, Kind.GRAD_TRUNK_OUT)
OF_PARTS = (Kind.PART_GRADS, Kind.PARTS, Kind.MASKED)
TOLD = (Kind.SMASHED, Kind.EVAL_SMASHED)  # of these, what a model's positions depend on is told

_GRACE_S = 0.2  # for the last words to a client that is given up

_log = logging.getLogger("hpc")


class Served:
    """The links of one trunk rank."""

    def __init__(
        self,
        *,
        config: Config,
        channels: dict[int, Channel],
        device: torch.device,
        hidden_size: int,
        dtype: torch.dtype,
        log: EventLog,
        asked: bool = False,
        described: bool = False,
    ) -> None:
        """`asked`: clients ask for what they want when they want it, and one that is lost harms no other.

        `described`: frames must tell their rows' layout (`Part.needs_layout`).
        """
        self.channels, self.device, self.log = channels, device, log
        self._former = LinkStats()  # of links that a client had before it came back
        self.hidden_size, self.dtype, self._described = hidden_size, dtype, described
        self.lost: set[int] = set()
        self.timeout_s, self.start_patience_s = config.link.timeout_s, config.link.start_patience_s
        self._spares_clients = config.train.min_clients > 0 or asked
        self._pieces = split_rows(config.train.per_client_batch_size, config.train.resolved_micro_batches)
        self._longest = config.data.longest_row
        self._caches = config.caches_smashed
        self._part_bytes: int | None = None
        for channel in channels.values():
            self._limit(channel)
        if (config.train.reads_ahead or asked or config.data.decodes) and (channels or self._spares_clients):
            timeout_s = config.link.timeout_s
            self.inbox: Inbox = ReadingInbox(channels, timeout_s=timeout_s, meanwhile=self._comfort_others)
        else:
            self.inbox = Inbox(channels)

    def recv(self, frame: Recv, step: int, *, on_device: bool = True) -> Frame | None:
        """This frame of this client; None if the client is lost and the run goes on without it.

        A client that sends a frame of another step, or other rows than the handshake agreed on, is lost as well; where
        the run needs every client, ProtocolError is raised.
        """
        client = frame.micro.client
        if client in self.lost:
            return None
        try:
            found = self.inbox.recv(client, frame.kind, device=self.device if on_device else None)
            self._check(found, frame, step)
        except LinkError as error:
            self.lose(client, step, error)
            return None
        return found

    def recv_out_of_turn(self, client: int, kind: Kind, step: int) -> Frame | None:
        """This client's next frame of this kind, before others that came; None if it is lost. See `Inbox`."""
        return self._interject(client, step, lambda: self.inbox.recv_out_of_turn(client, kind))

    def skip_to(self, client: int, kind: Kind, step: int) -> Frame | None:
        """This client's next frame of this kind and step, dropping what came before; None if it is lost."""
        return self._interject(client, step, lambda: self.inbox.skip_to(client, kind, step))

    def _interject(self, client: int, step: int, receive: Callable[[], Frame]) -> Frame | None:
        if client in self.lost:
            return None
        try:
            return receive()
        except LinkError as error:
            self.lose(client, step, error)
            return None

    def recv_any(self, awaited: Sequence[Recv], step: int, *, wait: bool) -> tuple[Recv | Lost | None, Frame | None]:
        """Whichever of these frames comes first; `Lost` for a client that is gone; None if none is here yet."""
        assert isinstance(self.inbox, ReadingInbox), "only a schedule that takes what comes first asks for any"
        for frame in awaited:
            if frame.micro.client in self.lost:
                return Lost(frame.micro.client), None
        kinds = {frame.micro.client: (frame.kind,) for frame in awaited}
        try:
            client, found = self.inbox.recv_any(kinds, wait=wait, device=self.device)
            if found is None:
                return None, None
            due = next(frame for frame in awaited if frame.micro.client == client)
            self._check(found, due, step)
        except LinkError as error:
            self.lose(self.inbox.taken_from, step, error)
            return Lost(self.inbox.taken_from), None
        return due, found

    def recv_request(self, clients: Sequence[int], kinds: tuple[Kind, ...]) -> tuple[int, Frame | None]:
        """The first frame of one of these kinds, and whose it is; no frame if that client is lost."""
        assert isinstance(self.inbox, ReadingInbox), "only where requests come in any order"
        try:
            return self.inbox.recv_any(dict.fromkeys(clients, kinds), wait=True, device=self.device)
        except LinkError as error:
            self.lose(self.inbox.taken_from, -1, error)
            return self.inbox.taken_from, None

    def send(self, client: int, header: Header, tensor: torch.Tensor | None = None) -> None:
        """Send, unless the client is lost."""
        if client in self.lost:
            return
        try:
            self.inbox.expect_anew(client)
            self.channels[client].send(header, tensor)
        except LinkError as error:
            self.lose(client, header.step, error)

    def present(self, clients: Iterable[int]) -> list[int]:
        """Those of `clients` that are this rank's and not lost."""
        return [client for client in clients if client in self.channels and client not in self.lost]

    def keep_waiting(self, busy: Sequence[int]) -> None:
        """Clients that wait for others' work hear that it goes on, so that a deadline means silence, not patience."""
        for client in self.present(self.channels):
            if client not in busy:
                self.send(client, Header(kind=Kind.ALIVE))

    def _comfort_others(self, awaited: Sequence[int]) -> None:
        """While the trunk waits for some clients, the others' deadlines must not run out."""
        self.keep_waiting(awaited)

    def flush(self) -> None:
        """Let what was sent leave, as well as it goes: for the moment before this rank ends the run."""
        for client in self.present(self.channels):
            with contextlib.suppress(LinkError):
                self.channels[client].flush()

    def stats(self) -> LinkStats:
        """Over all links; `wait_s` is the time in which this rank had nothing to do but wait for a client."""
        total = LinkStats.total([self._former, *(channel.stats for channel in self.channels.values())])
        total.wait_s = self.inbox.waited_s
        return total

    def lose(self, client: int, step: int, error: LinkError) -> None:
        """Go on without this client, or raise `error` if the run needs it."""
        if not self._spares_clients:
            raise error
        self.lost.add(client)
        # It may be alive, and only slow or mistaken. But the others wait: it gets no more time.
        self.channels[client].send_error(str(error), grace_s=_GRACE_S)
        self.channels[client].close(grace_s=_GRACE_S)
        self.log.note("client_lost", step=step + 1, client_id=client, why=str(error))
        _log.warning("client %d is lost; the run goes on without it: %s", client, error)

    def is_here(self, client: int) -> bool:
        """Whether the client's link works, as far as anyone knows. May be asked from any thread."""
        broken = isinstance(self.inbox, ReadingInbox) and client in self.channels and self.inbox.is_broken(client)
        return client in self.channels and client not in self.lost and not broken

    def take_back(self, client: int, channel: Channel, step: int) -> None:
        """A client that was lost has a new link."""
        assert isinstance(self.inbox, ReadingInbox), "only a run that spares clients takes one back"
        if client in self.channels:
            if client not in self.lost:
                self.lose(client, step, PeerLost(f"{channel.peer} ended, and came back before that was noticed"))
            self._former = LinkStats.total((self._former, self.channels[client].stats))
        self._limit(channel)
        self.channels[client] = channel
        self.lost.discard(client)
        self.inbox.replace(client, channel)

    def expect_parts(self, values: int) -> None:
        """So many values learn in each client's parts."""
        self._part_bytes = WIDEST * values
        for channel in self.channels.values():
            self._limit(channel)

    def _limit(self, channel: Channel) -> None:
        """A client that announces more than the run has use for is lost before memory is taken for it."""
        row_bytes = WIDEST * self._longest * self.hidden_size
        channel.limits.set(TRAINED, max(self._pieces) * row_bytes)
        channel.limits.set((Kind.EVAL_SMASHED,), MAX_ROWS * row_bytes)
        if self._part_bytes is not None:
            channel.limits.set(OF_PARTS, self._part_bytes)

    def _check(self, found: Frame, due: Recv, step: int) -> None:
        header, who = found.header, f"client {due.micro.client}"
        name = header.kind.name
        if header.step != step:
            raise ProtocolError(f"{who} sent {name} of step {header.step}, not {step}")
        if header.kind not in HIDDEN_STATES:
            return
        if not header.lengths or min(header.lengths) < 1:
            raise ProtocolError(f"{who} sent {name} with row lengths {header.lengths}")
        if max(header.lengths) > self._longest:
            raise ProtocolError(
                f"{who} sent {name} with a row of {max(header.lengths)} tokens; at most {self._longest} were agreed on"
            )
        whole = header.kind is not Kind.SMASHED or not self._caches  # else the cache has the rest, and checks
        tokens = sum(header.lengths) if whole else header.shape[0] if header.shape else -1
        if header.shape != (tokens, self.hidden_size) or header.dtype != self.dtype:
            raise ProtocolError(
                f"{who} sent {name} of {header.shape}, {header.dtype}; due: "
                f"{(sum(header.lengths), self.hidden_size)}, {self.dtype}"
            )
        if header.kind in TOLD:
            self.check_layout(header, who)
        if header.kind in TRAINED:
            self._check_batch(header, due.micro, who)

    def check_layout(self, header: Header, who: str) -> None:
        """Raise ProtocolError unless the rows' layout is told where the model needs it, and lies within the rows."""
        pairs = list(zip(header.layout[0::2], header.layout[1::2], strict=True))
        inside = all(mask <= context < n for (mask, context), n in zip(pairs, header.lengths, strict=False))
        if bool(pairs) != self._described or not inside:
            raise ProtocolError(
                f"{who} sent {header.kind.name} with a layout of {pairs} for rows of {header.lengths} tokens; due: "
                + ("two places inside of each row, the first no later" if self._described else "none")
            )

    def _check_batch(self, header: Header, micro: Micro, who: str) -> None:
        rows = self._pieces[micro.piece]
        if header.micro != micro.piece or len(header.lengths) != rows:
            raise ProtocolError(
                f"{who} sent {header.kind.name} of {len(header.lengths)} rows as piece {header.micro}; agreed: "
                f"{rows} rows as piece {micro.piece} (--train.per_client_batch_size, --train.micro_batches)"
            )
