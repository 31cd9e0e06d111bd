"""Federations that live at the same time take turns, so that all of them meet the same machine.

A machine's speed drifts by 10% within minutes: a ratio of two runs one after the other would measure the drift. The
members of a ring take their turns in order, over and over. A member is a whole federation or a single process; outside
its turn none of its roles begins a step.

A turn is a number of consecutive steps with what comes between them. It ends when every role that has work in the next
turn's first step stands before that step, so a hand-over or an average that the schedule puts in front of it, the
clients' own optimiser steps, and an evaluation belong to the turn that has just been.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from hpc.config import Config
from hpc.errors import PeerLost
from hpc.report.events import EventLog
from hpc.schedule import clients_of_step

if TYPE_CHECKING:
    from torch.distributed import Store

TURNS = "HPC_TURNS"  # environment variable: the ring that a run is a member of
LEADERS = ("trunk-0", "centralised")
CONNECT_S = 60.0  # whoever keeps the ring's store has it open before it starts a member
DONE, READY = "turns/done/{}", "turns/ready/{}/{}/{}"

Meter = Callable[[], Mapping[str, float]]


@dataclass(kw_only=True, frozen=True)
class Ring:
    """Who takes turns with whom, as one member sees it. Turns count from 0."""

    members: tuple[str, ...]
    me: str
    turns: int
    """Turns of each member. Whoever goes on behind its last one waits until everybody has had theirs."""
    steps_per_turn: int = 1
    port: int | None = None
    """Of the ring's own store; None: the ring meets in the run's store."""
    host: str = "127.0.0.1"
    """Where the ring's own store is."""

    def slot(self, turn: int) -> int:
        """The place of this member's turn among everybody's."""
        return turn * len(self.members) + self.members.index(self.me)

    def turn_of(self, step: int) -> int:
        """The turn in which a step is taken; `turns` for steps that come after the last."""
        return min(step // self.steps_per_turn, self.turns)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Ring:
        found = json.loads(text)
        return Ring(**{**found, "members": tuple(found["members"])})


class Turns:
    """A process's view of the ring, over the store in which the ring meets."""

    def __init__(self, store: Store, ring: Ring, *, timeout: timedelta) -> None:
        """`timeout`: longest wait for any one turn to end."""
        self.store, self.ring, self.timeout = store, ring, timeout
        self._seen = 0  # slots known to be over
        self._began = 0.0

    def begin(self, turn: int) -> None:
        """Wait until it is this member's turn; with `turn` equal to `ring.turns`, until all have had their last.

        Raises `PeerLost` that names the member whose turn did not end in time.
        """
        members = self.ring.members
        for slot in range(self._seen, min(self.ring.slot(turn), self.ring.turns * len(members))):
            # One after the other, so that the deadline is a single turn's and whoever is late can be named.
            turn_, who = divmod(slot, len(members))
            self._wait(DONE.format(slot), f"{members[who]} is gone or silent in turn {turn_ + 1}")
            self._seen = slot + 1
        self._began = time.perf_counter()

    def end(self, turn: int) -> float:
        """Let the next member go; returns the wall seconds since `begin`."""
        seconds = self.elapsed()
        self.give_away(turn)
        return seconds

    def elapsed(self) -> float:
        return time.perf_counter() - self._began

    def give_away(self, turn: int) -> None:
        """This turn is over, or was never needed."""
        self._set(DONE.format(self.ring.slot(turn)))

    def say_ready(self, turn: int, role: str) -> None:
        """`role` stands before the first step of `turn`."""
        self._set(READY.format(self.ring.me, turn, role))

    def await_ready(self, turn: int, role: str) -> None:
        self._wait(READY.format(self.ring.me, turn, role), f"{role} is gone or silent before turn {turn + 1}")

    def _wait(self, key: str, otherwise: str) -> None:
        from hpc.link.broken import lost_if_broken

        with lost_if_broken(otherwise):
            self.store.wait([key], self.timeout)

    def _set(self, key: str) -> None:
        from hpc.link.broken import lost_if_broken

        with lost_if_broken("whoever keeps the turns is gone"):
            self.store.set(key, "1")


class StepHooks:
    """What a role does before its steps and behind its last one. Here: nothing, as it is in no ring."""

    def before_step(self, step: int) -> None:
        """Returns when `step` (from 0) may begin."""

    def finish(self) -> None:
        """The role has done all its work; returns when it may end."""

    def give_up(self) -> None:
        """The run ends early: nobody must wait for this member's turns."""


class TurnTaker(StepHooks):
    """A role that follows: it says when it is ready, and waits for its member's turn."""

    def __init__(
        self, turns: Turns, role: str, *, log: EventLog | None = None, meter: Meter = dict[str, float]
    ) -> None:
        """With a `log` it notes its turns; `meter`: counts that only rise, noted by turn."""
        self._turns, self._ring, self._role, self._log, self._meter = turns, turns.ring, role, log, meter
        self._turn = -1
        self._before: Mapping[str, float] = {}

    def before_step(self, step: int) -> None:
        turn = self._ring.turn_of(step)
        if turn > self._turn:
            self._change(turn)

    def finish(self) -> None:
        """Hold still until the ring is over: a process that ends, or writes a report, takes time from the others."""
        # If the store is gone, so is the ring; if a member is late, that is the leader's to say.
        with suppress(PeerLost):
            self._hold_still()

    def _hold_still(self) -> None:
        if self._turn < self._ring.turns:
            self._change(self._ring.turns)

    def _change(self, turn: int) -> None:
        if self._turn >= 0:
            self._note(self._turns.elapsed())
        self._turns.say_ready(turn, self._role)
        self._begin(turn)

    def _begin(self, turn: int) -> None:
        self._turn = turn
        self._turns.begin(turn)
        self._before = self._meter()

    def _note(self, seconds: float) -> None:
        if self._log is not None:
            used = {name: value - self._before[name] for name, value in self._meter().items()}
            self._log.note("turn", number=self._turn + 1, seconds=seconds, **used)


class TurnLeader(TurnTaker):
    """The role that ends its member's turns: trunk rank 0, or the one of an uncut model."""

    def __init__(
        self, turns: Turns, role: str, *, log: EventLog, others: Callable[[int], list[str]], meter: Meter
    ) -> None:
        """`others`: roles that have work in a turn's first step."""
        super().__init__(turns, role, log=log, meter=meter)
        self._others = others

    def before_step(self, step: int) -> None:
        turn = self._ring.turn_of(step)
        if turn > self._turn:
            for role in self._others(step):
                self._turns.await_ready(turn, role)
            self._change(turn)

    def finish(self) -> None:
        self._hold_still()

    def give_up(self) -> None:
        for turn in range(max(self._turn, 0), self._ring.turns):
            self._turns.give_away(turn)

    def _change(self, turn: int) -> None:
        if self._turn >= 0:
            self._note(self._turns.end(self._turn))
        for skipped in range(self._turn + 1, turn):  # the run ended early
            self._turns.give_away(skipped)
        self._begin(turn)


def step_hooks(
    config: Config, role: str, *, store: Store | None, log: EventLog, meter: Meter = dict[str, float]
) -> StepHooks:
    """What this process's environment asks for. `store`: the run's; `meter`: see `TurnLeader`.

    Raises `PeerLost` if the ring's own store does not answer.
    """
    if TURNS not in os.environ:
        return StepHooks()
    ring, timeout = Ring.from_json(os.environ[TURNS]), timedelta(seconds=config.link.timeout_s)
    store = store if ring.port is None else _open_store(ring.host, ring.port)
    assert store is not None, "a ring without a port meets in the run's store"
    turns = Turns(store, ring, timeout=timeout)
    if role not in LEADERS:
        is_trunk = role.startswith("trunk-")  # it has links of its own, so what they carried adds to rank 0's
        return TurnTaker(turns, role, log=log if is_trunk else None, meter=meter)
    return TurnLeader(turns, role, log=log, others=lambda step: followers(config, step), meter=meter)


def followers(config: Config, step: int) -> list[str]:
    """The roles beside the leader that have work in `step` and say when they stand before it."""
    if config.train.schedule == "centralised":
        return []
    trunks = [f"trunk-{rank}" for rank in range(1, config.trunk.ranks)]
    if config.train.min_clients:  # a client that is lost says nothing, and the run goes on without it
        return trunks
    return trunks + [f"client-{client}" for client in clients_of_step(config.train, step)]


def _open_store(host: str, port: int) -> Store:
    from torch.distributed import TCPStore

    from hpc.link.broken import lost_if_broken

    with lost_if_broken("whoever keeps the turns is gone"):
        timeout = timedelta(seconds=CONNECT_S)
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
