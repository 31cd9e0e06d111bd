"""What has come over several links: taken link by link, or whichever comes first.

`Inbox` reads a link when it is asked to. `ReadingInbox` has a thread for each link that receives and opens frames
while the caller computes, so it can say which came first.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from hpc.errors import HpcError, LinkError, ProtocolError
from hpc.link.channel import Channel
from hpc.link.frame import Frame
from hpc.link.kinds import Kind
from hpc.link.transport import lost

_AHEAD = 8  # frames of one link that may wait to be taken; a peer that sends more than its program says is held up
_FOR_EVER_S = 30 * 86400.0  # the thread waits without being asked to; the deadline is that of whoever asks
_LOOK_S = 1.0  # between two looks at the deadlines


class Inbox:
    """Reads the channels in the caller's own thread."""

    def __init__(self, channels: Mapping[int, Channel]) -> None:
        self.channels = channels

    def recv(
        self, peer: int, *kinds: Kind, device: torch.device | None = None, patience_s: float | None = None
    ) -> Frame:
        """The peer's next frame, which may take `patience_s` instead of the usual. Raises as `Channel.recv` does."""
        return self.channels[peer].recv(*kinds, device=device, patience_s=patience_s)

    def recv_out_of_turn(self, peer: int, kind: Kind) -> Frame:
        """The peer's first frame of this kind; frames that came before it keep their place. Here: none may have."""
        return self.recv(peer, kind)

    def skip_to(self, peer: int, kind: Kind, step: int) -> Frame:
        """The peer's first frame of this kind and step; what came before it is dropped.

        Raises ProtocolError if that is more than a program sends ahead.
        """
        for _ in range(4 * _AHEAD):
            frame = self.recv(peer)
            if (frame.header.kind, frame.header.step) == (kind, step):
                return frame
        raise ProtocolError(f"{self.channels[peer].peer} sends on and on, and no {kind.name} of step {step}")

    def expect_anew(self, peer: int) -> None:
        """What this peer does next, it does upon what is sent to it now: its time begins anew."""

    @property
    def waited_s(self) -> float:
        """Wall seconds in which the caller waited for frames to begin."""
        return sum(channel.stats.wait_s for channel in self.channels.values())


class ReadingInbox(Inbox):
    """Reads every channel in a thread of its own, from the first call to its BYE."""

    def __init__(
        self,
        channels: Mapping[int, Channel],
        *,
        timeout_s: float,
        meanwhile: Callable[[Sequence[int]], None] = lambda awaited: None,
    ) -> None:
        """`meanwhile` is called every quarter of `timeout_s` of a wait, with those that are waited for."""
        super().__init__(channels)
        self._timeout_s, self._meanwhile = timeout_s, meanwhile
        self._changed = threading.Condition()
        self._frames: dict[int, deque[Frame]] = {peer: deque() for peer in channels}
        self._arrivals: deque[int] = deque()  # peers in the order in which their frames came
        self._broken: dict[int, HpcError] = {}
        self._asked: dict[int, float] = {}  # since when a peer is waited for
        self._waited_s, self.taken_from = 0.0, -1
        for peer, channel in channels.items():
            self._start_reading(peer, channel)

    def _start_reading(self, peer: int, channel: Channel) -> None:
        channel.read_elsewhere()
        threading.Thread(target=self._read, args=(peer, channel), name=f"read-{peer}", daemon=True).start()

    @property
    def waited_s(self) -> float:
        return self._waited_s

    def replace(self, peer: int, channel: Channel) -> None:
        """From now on the peer is at the other end of this channel."""
        with self._changed:
            self._frames[peer] = deque()
            self._arrivals = deque(each for each in self._arrivals if each != peer)
            self._broken.pop(peer, None)
            self._asked.pop(peer, None)
            self._changed.notify_all()
        self._start_reading(peer, channel)

    def recv(
        self, peer: int, *kinds: Kind, device: torch.device | None = None, patience_s: float | None = None
    ) -> Frame:
        frame = self._take((peer,), wait=True, patience_s=patience_s)
        return _checked(frame, peer, kinds, self.channels[peer], device)

    def recv_out_of_turn(self, peer: int, kind: Kind) -> Frame:
        return _checked(self._take((peer,), wait=True, kind=kind), peer, (kind,), self.channels[peer], None)

    def is_broken(self, peer: int) -> bool:
        """Whether the peer's link has ended, whoever noticed it or not."""
        with self._changed:
            return peer in self._broken

    def recv_any(
        self, peers: Mapping[int, tuple[Kind, ...]], *, wait: bool, device: torch.device | None = None
    ) -> tuple[int, Frame | None]:
        """The first frame of any of `peers`, of the kinds due from it; `(-1, None)` if none is here and not `wait`.

        Raises what broke a link, only after the frames before it were taken. `taken_from` says whose link or frame it
        was.
        """
        frame = self._take(tuple(peers), wait=wait)
        if frame is None:
            return -1, None
        peer = self.taken_from
        return peer, _checked(frame, peer, peers[peer], self.channels[peer], device)

    def expect_anew(self, peer: int) -> None:
        self._asked.pop(peer, None)

    def _take(
        self, peers: Sequence[int], *, wait: bool, kind: Kind | None = None, patience_s: float | None = None
    ) -> Frame | None:
        start = told = time.perf_counter()
        try:
            while True:
                with self._changed:
                    frame = self._next_of(peers, wait=wait, kind=kind, patience_s=patience_s or self._timeout_s)
                    if frame is not None or not wait:
                        return frame
                    self._changed.wait(min(_LOOK_S, self._timeout_s / 10))
                if time.perf_counter() - told > self._timeout_s / 4:
                    told = time.perf_counter()
                    self._meanwhile(peers)
        finally:
            self._waited_s += time.perf_counter() - start

    def _next_of(self, peers: Sequence[int], *, wait: bool, kind: Kind | None, patience_s: float) -> Frame | None:
        """Raises what broke a peer's link once its frames are used up, or PeerLost at its deadline."""
        for arrival, peer in enumerate(self._arrivals):
            if peer in peers:
                place = sum(each == peer for each in itertools.islice(self._arrivals, arrival))
                if kind is None or self._frames[peer][place].header.kind is kind:
                    return self._hand_out(peer, arrival, place)
        if wait:
            self._check_deadlines(peers, patience_s)
        for peer in peers:
            if peer in self._broken:
                self.taken_from = peer
                raise self._broken[peer]
        return None

    def _hand_out(self, peer: int, arrival: int, place: int) -> Frame:
        """The frame that came as number `arrival` of all, `place` of its peer's."""
        del self._arrivals[arrival]
        self._asked.pop(peer, None)
        self.taken_from = peer
        frame = self._frames[peer][place]
        del self._frames[peer][place]
        self._changed.notify_all()
        return frame

    def _check_deadlines(self, peers: Sequence[int], patience_s: float) -> None:
        now = time.monotonic()
        for peer in peers:
            channel = self.channels[peer]
            silent = now - max(self._asked.setdefault(peer, now), channel.heard)
            if silent > patience_s:
                self._broken.setdefault(peer, lost(channel.peer, "its next frame", silent, "silent"))

    def _read(self, peer: int, channel: Channel) -> None:
        try:
            while True:
                frame = channel.recv(patience_s=_FOR_EVER_S)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._frames[peer]) < _AHEAD or not self._reads(peer, channel))
                    if not self._reads(peer, channel):
                        return
                    self._frames[peer].append(frame)
                    self._arrivals.append(peer)
                    self._changed.notify_all()
                if frame.header.kind is Kind.BYE:
                    return
        except HpcError as error:
            broken = error
        except Exception as error:  # a thread's traceback would go unseen
            broken = LinkError(f"{channel.peer}: {type(error).__name__}: {error}")
        with self._changed:
            if self._reads(peer, channel):
                self._broken.setdefault(peer, broken)
            self._changed.notify_all()

    def _reads(self, peer: int, channel: Channel) -> bool:
        """Whether the peer is still at the other end of this channel (`replace`)."""
        return self.channels[peer] is channel


def _checked(
    frame: Frame | None, peer: int, kinds: tuple[Kind, ...], channel: Channel, device: torch.device | None
) -> Frame:
    assert frame is not None, "asked to wait"
    if kinds and frame.header.kind not in kinds:
        wanted = " or ".join(kind.name for kind in kinds)
        raise ProtocolError(f"{channel.peer} sent {frame.header.kind.name} where {wanted} was due")
    if frame.tensor is not None and device is not None:
        return Frame(header=frame.header, tensor=frame.tensor.to(device))
    return frame
