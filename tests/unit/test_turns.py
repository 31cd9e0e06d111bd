"""Turns: members as threads over a store, in the order of the ring, however fast each of them is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch.distributed as dist

from hpc.config import Config, TrainConfig, TrunkConfig
from hpc.errors import PeerLost
from hpc.report.events import EventLog, read_events, role_path
from hpc.turns import TURNS, Ring, StepHooks, TurnLeader, Turns, TurnTaker, followers, step_hooks

LONG = timedelta(seconds=20)
SHORT = timedelta(seconds=0.3)
NAMES = ("a", "b", "c")


def tcp_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=LONG)


def client_of(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=LONG)


def turns_of(store: dist.Store, me: str, turns: int = 3, timeout: timedelta = LONG, steps_per_turn: int = 1) -> Turns:
    return Turns(store, Ring(members=NAMES, me=me, turns=turns, steps_per_turn=steps_per_turn), timeout=timeout)


def together(*work: Callable[[], object]) -> None:
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(each) for each in work]:
            done.result(timeout=30)


@pytest.mark.parametrize("over", ["threads", "tcp"])
def test_members_go_in_order_and_never_at_the_same_time(over: str) -> None:
    store, seen = tcp_store() if over == "tcp" else dist.HashStore(), []

    def member(name: str, pause_s: float) -> None:
        # A TCPStore waits under a lock of its own, so each member needs one.
        turns = turns_of(client_of(store) if isinstance(store, dist.TCPStore) else store, name)
        for turn in range(3):
            turns.begin(turn)
            seen.append((name, turn, "begin"))
            time.sleep(pause_s)
            seen.append((name, turn, "end"))
            turns.end(turn)

    together(lambda: member("c", 0), lambda: member("b", 0.02), lambda: member("a", 0.005))
    assert seen == [(name, turn, what) for turn in range(3) for name in NAMES for what in ("begin", "end")]


def test_a_turn_is_timed_from_its_begin() -> None:
    store = dist.HashStore()
    late = turns_of(store, "b")

    def first() -> None:
        turns = turns_of(store, "a")
        turns.begin(0)
        time.sleep(0.2)
        turns.end(0)

    def second() -> None:
        late.begin(0)
        time.sleep(0.05)
        assert 0.05 <= late.end(0) < 0.2

    together(first, second)


def test_a_member_that_is_gone_is_named_at_the_deadline() -> None:
    store = dist.HashStore()
    alive = turns_of(store, "a", timeout=SHORT)
    alive.begin(0)
    alive.end(0)
    turns_of(store, "b").give_away(0)
    started = time.monotonic()
    with pytest.raises(PeerLost, match="c is gone or silent in turn 1"):
        alive.begin(1)
    assert time.monotonic() - started < 5


def test_a_store_that_is_gone_is_a_lost_peer() -> None:
    store = tcp_store()
    turns = turns_of(client_of(store), "b")
    del store
    with pytest.raises(PeerLost, match="a is gone"):
        turns.begin(0)


def test_the_deadline_is_for_a_single_turn() -> None:
    """Each waits for two others of 0.5 s, with a deadline of 0.8 s: nobody is late."""
    store = dist.HashStore()

    def member(name: str) -> None:
        turns = turns_of(store, name, turns=2, timeout=timedelta(seconds=0.8))
        for turn in range(2):
            turns.begin(turn)
            time.sleep(0.5)
            turns.end(turn)

    together(*(lambda name=name: member(name) for name in NAMES))


class Federation:
    """A leader and two clients that pass a token between steps, as `serial` hands its parts on: threads."""

    def __init__(self, store: dist.Store, folder: Path, me: str, steps_per_turn: int) -> None:
        self._store, self._me, self._count = store, me, steps_per_turn
        self._log = EventLog(role_path(folder, "trunk-0"))
        self._barrier = threading.Barrier(3)
        self.work: list[tuple[float, float]] = []  # from, until
        self.steps = 0

    def leader(self) -> TurnLeader:
        turns = turns_of(self._store, self._me, 2, steps_per_turn=self._count)
        others = ["client-0", "client-1"]
        return TurnLeader(turns, "trunk-0", log=self._log, others=lambda step: others, meter=self._meter)

    def client(self, number: int) -> TurnTaker:
        return TurnTaker(turns_of(self._store, self._me, 2, steps_per_turn=self._count), f"client-{number}")

    def _meter(self) -> Mapping[str, float]:
        return {"taken": self.steps}

    def run(self, hooks: StepHooks, steps: int, after_step_s: float = 0.0) -> None:
        for step in range(steps):
            hooks.before_step(step)
            start = time.perf_counter()
            self._barrier.wait(20)  # a step needs all roles
            time.sleep(0.01)
            if isinstance(hooks, TurnLeader):
                self.steps += 1
            time.sleep(after_step_s)
            self.work.append((start, time.perf_counter()))
        self._barrier.wait(20)  # the goodbye
        hooks.finish()

    def notes(self) -> list[dict[str, float]]:
        return [event for event in read_events(self._log.path) if event["event"] == "turn"]


def run_federations(tmp_path: Path, steps: Mapping[str, int]) -> dict[str, Federation]:
    store = dist.HashStore()
    counts = {"a": 1, "b": 3, "c": 1}
    found = {name: Federation(store, tmp_path / name, name, counts[name]) for name in NAMES}
    work: list[Callable[[], object]] = []
    for name, each in found.items():
        work += [
            lambda each=each, name=name: each.run(each.leader(), steps[name]),
            lambda each=each, name=name: each.run(each.client(0), steps[name]),
            # This client is still at work (its optimiser step, a hand-over) when the leader's step is over.
            lambda each=each, name=name: each.run(each.client(1), steps[name], after_step_s=0.1),
        ]
    together(*work)
    return found


def test_all_roles_hold_still_outside_their_turn(tmp_path: Path) -> None:
    found = run_federations(tmp_path, {"a": 2, "b": 6, "c": 2})
    spans = {name: sorted(each.work) for name, each in found.items()}
    assert [len(spans[name]) for name in NAMES] == [6, 18, 6]
    order = [(name, turn) for turn in range(2) for name in NAMES]
    sizes = {"a": 3, "b": 9, "c": 3}  # three roles
    bounds = []
    for name, turn in order:
        mine = spans[name][turn * sizes[name] : (turn + 1) * sizes[name]]
        bounds.append((min(start for start, _ in mine), max(end for _, end in mine)))
    for (_, before), (after, _) in pairwise(bounds):
        assert before <= after


def test_a_turn_lasts_until_its_slowest_role_is_done_and_is_noted(tmp_path: Path) -> None:
    found = run_federations(tmp_path, {"a": 2, "b": 6, "c": 2})
    for name, count in (("a", 1), ("b", 3)):
        notes = found[name].notes()
        assert [note["number"] for note in notes] == [1, 2]
        assert [note["taken"] for note in notes] == [count, count]
        assert notes[0]["seconds"] >= 0.1 * count


def test_what_comes_behind_the_last_turn_waits_for_the_ring(tmp_path: Path) -> None:
    found = run_federations(tmp_path, {"a": 3, "b": 6, "c": 2})
    last_of_c = max(end for _, end in found["c"].work)
    third = sorted(found["a"].work)[6:]
    assert len(third) == 3
    assert min(start for start, _ in third) >= last_of_c
    assert len(found["a"].notes()) == 2


def test_a_run_that_ends_early_gives_its_turns_away(tmp_path: Path) -> None:
    found = run_federations(tmp_path, {"a": 1, "b": 6, "c": 2})
    assert [len(found[name].notes()) for name in NAMES] == [1, 2, 2]


def test_a_follower_ends_in_peace_when_the_ring_is_gone() -> None:
    TurnTaker(turns_of(dist.HashStore(), "b", timeout=SHORT), "client-0").finish()


def test_a_leader_does_not() -> None:
    turns = turns_of(dist.HashStore(), "b", timeout=SHORT)
    leader = TurnLeader(turns, "trunk-0", log=EventLog("unused/x"), others=lambda step: [], meter=dict)
    with pytest.raises(PeerLost, match="a is gone"):
        leader.finish()


def test_a_leader_waits_for_its_roles_and_names_them(tmp_path: Path) -> None:
    turns = turns_of(dist.HashStore(), "a", timeout=SHORT)
    leader = TurnLeader(turns, "trunk-0", log=EventLog(tmp_path / "x"), others=lambda step: ["client-3"], meter=dict)
    with pytest.raises(PeerLost, match="client-3 is gone or silent before turn 1"):
        leader.before_step(0)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("client_batch", 0, ["trunk-1", "client-0", "client-1", "client-2"]),
        ("serial", 0, ["trunk-1", "client-0"]),
        ("serial", 4, ["trunk-1", "client-1"]),
        ("centralised", 0, []),
    ],
)
def test_who_has_work_in_a_step(schedule: str, step: int, expected: list[str]) -> None:
    train = TrainConfig(schedule=schedule, clients=3)  # type: ignore[arg-type]
    assert followers(Config(train=train, trunk=TrunkConfig(ranks=2)), step) == expected


def test_nobody_waits_for_a_client_that_may_be_lost() -> None:
    assert followers(Config(train=TrainConfig(clients=3, min_clients=2)), 0) == []


def test_a_ring_travels_as_text() -> None:
    ring = Ring(members=NAMES, me="b", turns=8, steps_per_turn=4, port=12345)
    assert Ring.from_json(ring.to_json()) == ring
    assert [ring.turn_of(step) for step in (0, 3, 4, 31, 32, 99)] == [0, 0, 1, 7, 8, 8]


def test_a_run_without_a_ring_takes_no_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(TURNS, raising=False)
    hooks = step_hooks(Config(), "trunk-0", store=None, log=EventLog(tmp_path / "x"))
    assert type(hooks) is StepHooks
    hooks.before_step(0)
    hooks.finish()


def test_the_environment_says_which_ring_and_the_role_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = tcp_store()
    monkeypatch.setenv(TURNS, Ring(members=NAMES, me="a", turns=1, port=store.port).to_json())
    log = EventLog(tmp_path / "x")
    assert type(step_hooks(Config(), "client-1", store=None, log=log)) is TurnTaker
    assert type(step_hooks(Config(), "trunk-1", store=None, log=log)) is TurnTaker
    assert type(step_hooks(Config(), "centralised", store=None, log=log)) is TurnLeader


def test_every_trunk_rank_notes_what_its_links_carried(tmp_path: Path) -> None:
    store, carried = dist.HashStore(), [100]
    turns_of(store, "a", turns=1).give_away(0)
    with EventLog(tmp_path / "trunk-1" / "metrics.jsonl") as log:
        rank = TurnTaker(turns_of(store, "b", turns=1), "trunk-1", log=log, meter=lambda: {"payload": carried[0]})
        rank.before_step(0)
        carried[0] += 7
        for member in ("b", "c"):
            turns_of(store, member, turns=1).give_away(0)
        rank.before_step(1)
    (note,) = read_events(log.path)
    assert (note["event"], note["number"], note["payload"]) == ("turn", 1, 7)
