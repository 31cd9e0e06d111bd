"""Strangers who knock, again and again, cost a bounded number of threads and handshakes, and hold up no known client.

Real handshakes in real threads, over loopback; the knocks come through the counter that clients announce themselves by.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from hpc import admission
from hpc.admission import LONGEST_PENANCE_S, PLACES, Admission
from hpc.config import LinkConfig
from hpc.errors import HpcError, IdentityError
from hpc.link import identity
from hpc.link.channel import Channel
from hpc.link.connect import open_client_channel, open_server_channel
from hpc.link.frame import Header, Kind
from hpc.link.transport import LoopbackTransport, loopback_pair

TIMEOUT_S = 4.0  # of a handshake


class Door:
    """A store's counters and the network behind it: whoever raises a counter may hold the other end of a link."""

    def __init__(self, keys: Path, *, clients: int = 2) -> None:
        self.starts = Counter(dict.fromkeys(range(clients), 0))
        self.ends: dict[tuple[int, int], tuple[LoopbackTransport, LoopbackTransport]] = {}
        self.refused: list[tuple[int, str]] = []
        self.busy: Counter[int] = Counter()
        self.most: Counter[int] = Counter()
        self.connected: Counter[int] = Counter()
        self._lock = threading.Lock()
        self._link = LinkConfig(keys_dir=str(keys), timeout_s=TIMEOUT_S)
        self.admission = Admission(
            range(clients),
            starts=lambda client: self.starts[client],
            connect=self._connect,
            is_here=lambda client: False,
            refused=lambda client, why: self.refused.append((client, why)),
            timeout_s=TIMEOUT_S,
            start_patience_s=TIMEOUT_S,
            clients_meet=False,
        )

    def knock(self, client: int) -> LoopbackTransport:
        """Announce a start; the client's end of the link that the trunk rank will make."""
        with self._lock:
            here, there = loopback_pair(f"client-{client}", "server")
            self.ends[client, self.starts[client]] = here, there
            self.starts[client] += 1
        return here

    def log_in(self, client: int, keys: Path | None = None) -> Channel:
        link = self._link if keys is None else LinkConfig(keys_dir=str(keys), timeout_s=TIMEOUT_S)
        return open_client_channel(self.knock(client), link=link, client_id=client, agreement={})[0]

    def _connect(self, client: int, epoch: int) -> Channel:
        with self._lock:
            self.busy[client] += 1
            self.connected[client] += 1
            self.most[client] = max(self.most[client], self.busy[client])
        try:
            there = self.ends[client, epoch][1]
            return open_server_channel(there, link=self._link, client_id=client, agreement={})[0]
        finally:
            with self._lock:
                self.busy[client] -= 1


@pytest.fixture
def door(pristine_keys: Path) -> Iterator[Door]:
    made = Door(pristine_keys)
    yield made
    made.admission.close()
    for ends in made.ends.values():
        for end in ends:
            end.close()


@pytest.fixture(scope="module")
def foreign_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Identities of the same names that nobody here has authorised; it knows the true server's key."""
    folder = tmp_path_factory.mktemp("foreign") / "keys"
    identity.ensure_local(folder, 1)
    return folder


def arrives(door: Door, client: int, within_s: float) -> float:
    """Seconds until the client is linked."""
    start = time.monotonic()
    while client not in door.admission.arrived():
        assert time.monotonic() - start < within_s, f"client {client} was not let in; refused: {door.refused}"
        time.sleep(0.02)
    return time.monotonic() - start


def admit_threads() -> int:
    return sum(thread.name.startswith("admit-") for thread in threading.enumerate())


def test_silent_strangers_hold_a_few_threads_and_delay_nobody_else(door: Door) -> None:
    """Two hundred start as client 0 and say nothing: client 1 comes in at once, and client 0 when they are through."""
    for _ in range(200):
        door.knock(0)
    time.sleep(3 * admission.POLL_S)
    assert door.busy[0] == PLACES
    assert admit_threads() <= PLACES
    door.log_in(1)
    assert arrives(door, 1, TIMEOUT_S) < TIMEOUT_S / 2
    known: dict[str, Any] = {}

    def insist() -> None:
        """A real client starts again when nobody has answered it."""
        while "channel" not in known and not known.get("over"):
            with suppress(HpcError):
                known["channel"] = door.log_in(0)

    waiter = threading.Thread(target=insist)
    waiter.start()
    try:
        arrives(door, 0, 3 * TIMEOUT_S + LONGEST_PENANCE_S)
    finally:
        known["over"] = True
        waiter.join(2 * TIMEOUT_S)
    assert door.most[0] <= PLACES
    assert door.connected[0] <= 3 * PLACES, "of 200 knocks most were never dealt with"


def test_strangers_who_are_refused_are_dealt_with_ever_more_slowly(
    door: Door, foreign_keys: Path, pristine_keys: Path
) -> None:
    """Each is told why; they get so many handshakes a second, however fast they come."""
    over, words = threading.Event(), []

    def pester() -> None:
        while not over.is_set():
            try:
                door.log_in(0, foreign_keys)
            except IdentityError as error:
                words.append(str(error))
            except HpcError:
                pass

    pests = [threading.Thread(target=pester) for _ in range(6)]
    for pest in pests:
        pest.start()
    try:
        door.log_in(1)
        arrives(door, 1, TIMEOUT_S)
        time.sleep(2.0)
        assert door.most[0] <= PLACES
        assert 1 <= door.connected[0] <= 4 * PLACES
        assert 0 not in door.admission.arrived()
    finally:
        over.set()
        for end in [end for ends in door.ends.values() for end in ends]:
            end.close()
        for pest in pests:
            pest.join(2 * TIMEOUT_S)
            assert not pest.is_alive()
    assert any("not authorised" in each or "is pinned" in each for each in [*words, *(why for _, why in door.refused)])


def test_two_starts_at_once_are_both_dealt_with(door: Door, foreign_keys: Path) -> None:
    """A stranger who starts just behind a client does not take its place."""
    found: dict[str, Channel] = {}
    client = threading.Thread(target=lambda: found.update(channel=door.log_in(0)))
    client.start()
    while door.starts[0] < 1:
        time.sleep(0.001)
    door.knock(0)
    arrives(door, 0, TIMEOUT_S)
    client.join(TIMEOUT_S)
    door.admission.take(0).channel.send(Header(kind=Kind.READY))  # type: ignore[union-attr]
    assert found["channel"].recv(Kind.READY).header.kind is Kind.READY


def test_a_counter_that_jumps_by_billions_costs_nothing(door: Door) -> None:
    door.starts[0] = 2**62
    time.sleep(3 * admission.POLL_S)
    assert door.connected[0] <= 3 * PLACES
    assert admit_threads() <= PLACES
    door.log_in(1)
    arrives(door, 1, TIMEOUT_S)
