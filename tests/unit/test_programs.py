"""Programs without processes: every send has its receive, nobody waits for ever, and what is kept is bounded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.acts import (
    Backward,
    Combine,
    Forward,
    HeadBackward,
    HeadForward,
    Lost,
    Micro,
    Recv,
    RecvAny,
    Send,
    Step,
    TailStep,
)
from hpc.link.kinds import Kind
from hpc.programs import HEAD_STARTS, Traits, client_step, client_sync, trunk_step, trunk_sync
from hpc.schedule import Sync, TrainStep


def traits(**given_: Any) -> Traits:
    values: dict[str, Any] = {
        "micro_batches": 1,
        "head_learns": True,
        "caches_smashed": False,
        "shares_gradient": True,
        "averages_parts": False,
        "secure": False,
        "first_come": False,
    }
    return Traits(**{**values, **given_})


@st.composite
def any_traits(draw: Any) -> Traits:
    first_come = draw(st.booleans())
    head_learns, shares = draw(st.booleans()), draw(st.booleans())
    return Traits(
        micro_batches=draw(st.integers(1, 9)) if first_come else 1,
        head_learns=head_learns,
        caches_smashed=not head_learns and draw(st.booleans()),
        shares_gradient=shares,
        averages_parts=not shares and draw(st.booleans()),
        secure=draw(st.booleans()),
        first_come=first_come,
    )


class World:
    """Links as queues, roles as programs; `pick` decides who moves when several can."""

    def __init__(self, pick: Any, ranks: int, clients: int, lost: frozenset[int] = frozenset()) -> None:
        self.pick, self.ranks, self.lost = pick, ranks, lost
        self.up: dict[int, deque[tuple[Kind, Micro]]] = {c: deque() for c in range(clients)}
        self.down: dict[int, deque[tuple[Kind, Micro]]] = {c: deque() for c in range(clients)}
        self.kept: Counter[tuple[str, int]] = Counter()
        self.most: Counter[str] = Counter()
        self.done: list[tuple[Any, Any]] = []
        self.combining: dict[int, Kind] = {}

    def keep(self, what: str, who: int, change: int) -> None:
        self.kept[what, who] += change
        assert self.kept[what, who] >= 0, f"{what} of {who} used before it was made"
        self.most[what] = max(self.most[what], self.kept[what, who])


def run_client(world: World, client: int, acts: Iterator[Any]) -> Generator[Any, None, None]:
    """Yields when it has to wait. Frames that come before their turn are put aside, as the client does."""
    aside: list[tuple[Kind, Micro]] = []
    alive = [] if client in world.lost else acts
    for act in alive:
        world.done.append((client, act))
        match act:
            case Send():
                world.up[client].append((act.kind, act.micro))
            case Recv():
                while (act.kind, act.micro) not in aside:
                    while not world.down[client]:
                        yield f"client {client} waits for {act}"
                    aside.append(world.down[client].popleft())
                aside.remove((act.kind, act.micro))
            case HeadForward():
                world.keep("head", client, +1)
            case HeadBackward():
                world.keep("head", client, -1)
    assert not aside, f"client {client} was sent {aside}, which it never asked for"


def run_trunk(world: World, rank: int, program: Any) -> Generator[Any, None, None]:
    answer = None
    gone: set[int] = set()
    while True:
        try:
            act = program.send(answer)
        except StopIteration:
            return
        answer = None
        world.done.append((f"trunk-{rank}", act))
        match act:
            case Send():
                world.down[act.micro.client].append((act.kind, act.micro))
            case Recv() if act.micro.client in world.lost:
                pass
            case Recv():
                while not world.up[act.micro.client]:
                    yield f"trunk {rank} waits for {act}"
                assert world.up[act.micro.client].popleft() == (act.kind, act.micro)
            case RecvAny():
                while True:
                    fitting = [f for f in act.awaited if world.up[f.micro.client]]
                    lost = [f.micro.client for f in act.awaited if f.micro.client in world.lost - gone]
                    if fitting or lost:
                        break
                    if not act.wait:
                        break
                    yield f"trunk {rank} waits for any of {act.awaited}"
                if lost:
                    gone.add(lost[0])
                    answer = Lost(lost[0])
                elif fitting and (act.wait or world.pick([True, False])):
                    answer = world.pick(fitting)
                    assert world.up[answer.micro.client].popleft() == (answer.kind, answer.micro)
            case Forward():
                world.keep("trunk", rank, len(act.batch))
            case Backward():
                world.keep("trunk", rank, -len(act.batch))
            case Combine():  # all ranks together
                world.combining[rank] = act.kind
                while len(world.combining) < world.ranks and rank in world.combining:
                    yield f"trunk {rank} waits for the other ranks"
                assert world.combining.get(rank, act.kind) is act.kind
                if len(world.combining) == world.ranks:
                    assert set(world.combining.values()) == {act.kind}, "ranks combine different things"
                    world.combining.clear()


def play(pick: Any, client_programs: list[Any], trunk_programs: list[Any], lost: frozenset[int] = frozenset()) -> World:
    world = World(pick, len(trunk_programs), len(client_programs), lost)
    roles = [run_client(world, c, acts) for c, acts in enumerate(client_programs)]
    roles += [run_trunk(world, r, program) for r, program in enumerate(trunk_programs)]
    stalled: set[int] = set()  # roles that could not move since somebody last did
    while roles:
        able = [role for role in roles if id(role) not in stalled]
        assert able, f"nobody can move: {[next(role, None) for role in roles]}"
        role = pick(able)
        before = len(world.done)
        try:
            next(role)
            stalled.add(id(role))
        except StopIteration:
            roles.remove(role)
            stalled.clear()
        if len(world.done) > before:
            stalled = {id(role)}
    return world


def play_step(pick: Any, t: Traits, order: TrainStep, clients: int, ranks: int, lost: Any = frozenset()) -> World:
    mine = [[c for c in range(clients) if c % ranks == r] for r in range(ranks)]
    return play(
        pick,
        [client_step(order, t, c) for c in range(clients)],
        [trunk_step(order, t, own) for own in mine],
        lost,
    )


def all_read(world: World) -> None:
    for c in world.up:
        assert not world.up[c], f"the trunk never read {list(world.up[c])}"
        assert c in world.lost or not world.down[c], f"client {c} never read {list(world.down[c])}"


def order_of(active: list[int]) -> TrainStep:
    return TrainStep(step=0, clients=tuple(active), batches=(0,) * len(active))


@settings(deadline=None, max_examples=150)
@given(st.data(), any_traits(), st.integers(1, 12), st.integers(1, 3))
def test_every_send_has_its_receive_in_whatever_order_roles_move(
    data: Any, t: Traits, clients: int, ranks: int
) -> None:
    ranks = min(ranks, clients)
    active = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
    rng = data.draw(st.randoms(use_true_random=False))
    world = play_step(rng.choice, t, order_of(active), clients, ranks)
    all_read(world)
    assert not +world.kept or not t.head_learns
    assert world.kept["trunk", 0] == 0
    steps = [who for who, act in world.done if isinstance(act, Step)]
    followers = range(clients) if t.shares_gradient else active
    assert Counter(steps) == Counter([*followers, *(f"trunk-{r}" for r in range(ranks))])
    works = Counter(act.micro for _, act in world.done if isinstance(act, TailStep))
    assert works == Counter(Micro(c, m) for c in active for m in range(t.micro_batches))


@pytest.mark.parametrize("clients", [1, 2, 3, 5, 8, 17, 64])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 16])
@pytest.mark.parametrize("slowest_first", [True, False])
def test_nobody_waits_for_ever(clients: int, micro_batches: int, slowest_first: bool) -> None:
    def pick(options: list[Any]) -> Any:  # the same end always: some roles starve as long as they can
        return options[0 if slowest_first else -1]

    t = traits(micro_batches=micro_batches, first_come=True)
    world = play_step(pick, t, order_of(list(range(clients))), clients, 1)
    all_read(world)
    assert world.most["trunk"] <= max(2, clients)
    assert world.most["head"] <= HEAD_STARTS + 1


@settings(deadline=None, max_examples=60)
@given(st.randoms(use_true_random=False), any_traits(), st.integers(1, 10))
def test_what_is_kept_is_bounded(rng: Any, t: Traits, clients: int) -> None:
    world = play_step(rng.choice, t, order_of(list(range(clients))), clients, 1)
    assert world.most["trunk"] <= max(2, clients)
    if t.head_learns:
        assert world.most["head"] <= HEAD_STARTS + 1
    queued = (2 + HEAD_STARTS) if t.first_come else 3
    assert max(map(len, world.up.values())) <= queued


@settings(deadline=None, max_examples=60)
@given(st.data(), any_traits(), st.integers(2, 8), st.integers(1, 2))
def test_an_average_pairs_up(data: Any, t: Traits, clients: int, ranks: int) -> None:
    active = sorted(data.draw(st.sets(st.integers(0, clients - 1), min_size=1)))
    rng = data.draw(st.randoms(use_true_random=False))
    order = Sync(step=3, clients=tuple(active))
    mine = [[c for c in range(clients) if c % ranks == r] for r in range(ranks)]
    world = play(
        rng.choice, [client_sync(order, t, c) for c in range(clients)], [trunk_sync(order, t, own) for own in mine]
    )
    all_read(world)
    took_up = sum(isinstance(act, Step) for who, act in world.done if isinstance(who, int))
    assert took_up == (clients if t.averages_parts else 0)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(2, 8), st.integers(1, 4))
def test_the_others_finish_their_work_without_a_lost_client(data: Any, clients: int, micro_batches: int) -> None:
    lost = frozenset(data.draw(st.sets(st.integers(0, clients - 1), min_size=1, max_size=clients - 1)))
    rng = data.draw(st.randoms(use_true_random=False))
    t = traits(micro_batches=micro_batches, first_come=True)
    world = play_step(rng.choice, t, order_of(list(range(clients))), clients, 1, lost)
    all_read(world)
    works = Counter(act.micro.client for _, act in world.done if isinstance(act, TailStep))
    assert works == {c: micro_batches for c in range(clients) if c not in lost}


def test_backward_comes_before_forward() -> None:
    """It frees memory, and a client waits for it."""
    t = traits(micro_batches=2, first_come=True)
    program = trunk_step(order_of([0, 1]), t, [0, 1])
    arrivals = deque(
        [
            Recv(Kind.SMASHED, Micro(0, 0)),
            None,
            Recv(Kind.SMASHED, Micro(0, 1)),
            Recv(Kind.GRAD_TRUNK_OUT, Micro(0, 0)),
            Recv(Kind.SMASHED, Micro(1, 0)),
            None,
        ]
    )
    done: list[Any] = []
    answer: Any = None
    while arrivals or not isinstance(done[-1], Send):
        act = program.send(answer)
        answer = arrivals.popleft() if isinstance(act, RecvAny) and arrivals else None
        done.append(act)
    acts = [act for act in done if isinstance(act, (Forward, Backward))]
    assert acts == [Forward((Micro(0, 0),)), Backward((Micro(0, 0),))]
