"""A client that was lost comes back: it is given what the others have learned, and takes part again."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.agreement import lasting_agreement
from hpc.client import Client
from hpc.config import AdapterConfig, Config, DataConfig, TrunkConfig
from hpc.link.identity import Authorised, client_name, load_private
from hpc.link.kinds import Kind
from hpc.link.peers import PeerKeys
from hpc.report.events import read_events, role_path
from hpc.resume import find
from tests.loopback import Outcome, run_split
from tests.plain import plain_run
from tests.unit.test_lost_clients import DEAD, dies_before, steps_of
from tests.unit.test_lost_clients import config as lost_config

STEPS, LOST_AT, BACK_AT = 6, 1, 4  # steps from 0


def config(**train: Any) -> Config:
    return lost_config(**{"lr_scheduler": "constant", "min_clients": 1, **train})


def keys_of(folder: Path) -> Callable[[int], PeerKeys]:
    def make(client: int) -> PeerKeys:
        pinned = Authorised.load(folder).by_client_id()
        return PeerKeys(client, load_private(folder, client_name(client)), pinned, "run")

    return make


def dies_once(kind: Kind = Kind.SMASHED, step: int = LOST_AT) -> Callable[[Client], None]:
    """The first process of client DEAD closes its link instead of sending this frame."""
    die, lives = dies_before(kind, step), itertools.count()

    def prepare(client: Client) -> None:
        if client.client_id == DEAD and next(lives) == 0:
            die(client)

    return prepare


def run(folder: Path, keys: Path, settings: Config, *, kind: Kind = Kind.SMASHED, **options: Any) -> Outcome:
    make_peers = keys_of(keys)
    peers = {k: make_peers(k) for k in range(3)}
    prepare = dies_once(kind)

    def prepare_with_new_keys(client: Client) -> None:
        if client.needs_state and settings.train.clients_meet:
            client.fellows.peers = make_peers(client.client_id)
            object.__setattr__(client.side, "peers", client.fellows.peers)
        prepare(client)

    found = {"returning": 1, "waits_for_return": BACK_AT, "dying": frozenset({DEAD}), **options}
    return run_split(settings, folder, prepare=prepare_with_new_keys, peers=peers, make_peers=make_peers, **found)


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(role_path(folder, "trunk-0")) if event["event"] == name]


def all_alike(outcome: Outcome) -> None:
    first = outcome.clients[0].learner.parameters
    for client in outcome.clients[1:]:
        for name, value in client.learner.parameters.items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined"])
def test_it_equals_a_run_in_which_it_only_sat_out(schedule: str, tmp_path: Path, pristine_keys: Path) -> None:
    """Against a plain loop: moments and parameters of the one that returns are those of who stayed."""
    settings = config(schedule=schedule)
    outcome = run(tmp_path, pristine_keys, settings)
    (back,) = events(tmp_path, "client_returned")
    assert (back["client_id"], back["step"]) == (DEAD, BACK_AT + 1)
    assert steps_of(tmp_path, DEAD) == [1, 5, 6]
    absent = {step: {DEAD} for step in range(LOST_AT, BACK_AT)}
    losses, trained = plain_run(settings, [(0, 1, 2)] * STEPS, absent)
    assert outcome.losses == pytest.approx(losses, rel=1e-4)
    for name, value in trained.items():
        torch.testing.assert_close(outcome.trained[name], value, rtol=0, atol=5e-5)
    all_alike(outcome)


@pytest.mark.parametrize(
    "train",
    [
        {"schedule": "client_batch", "aggregation": "fedavg", "sync_every": 2},
        {"schedule": "replica", "sync_every": 2},
        {"schedule": "client_batch", "eval_every": 2},
    ],
)
def test_where_parts_are_averaged_it_comes_back_after_an_average(
    train: dict[str, Any], tmp_path: Path, pristine_keys: Path
) -> None:
    outcome = run(tmp_path, pristine_keys, config(**train), waits_for_return=3)
    (back,) = events(tmp_path, "client_returned")
    assert back["step"] - 1 == (3 if "eval_every" in train else 4)
    assert steps_of(tmp_path, DEAD)[-1] == STEPS
    all_alike(outcome)


@pytest.mark.parametrize("aggregation", ["gradient", "fedavg"])
def test_secure_rounds_come_off_with_the_one_that_is_back(
    aggregation: str, tmp_path: Path, pristine_keys: Path
) -> None:
    """It has new keys; the masked run equals the plain one in which the same client was away."""
    train = {"aggregation": aggregation, "sync_every": 2}
    masked = run(tmp_path / "masked", pristine_keys, config(secure_aggregation=True, **train))
    plain = run(tmp_path / "plain", pristine_keys, config(**train))
    for folder in ("masked", "plain"):
        assert [event["step"] for event in events(tmp_path / folder, "client_returned")] == [BACK_AT + 1]
    for name, value in plain.trained.items():
        torch.testing.assert_close(masked.trained[name], value, rtol=0, atol=1e-6)


def test_its_cache_begins_anew_on_both_ends(tmp_path: Path, pristine_keys: Path) -> None:
    settings = config()
    cached = Config(
        **{
            **vars(settings),
            "adapter": AdapterConfig(lora_r=2, parts=["trunk", "tail"]),
            "trunk": TrunkConfig(smashed_cache_mib=1),
        }
    )
    outcome = run(tmp_path, pristine_keys, cached)
    assert steps_of(tmp_path, DEAD) == [1, 5, 6]
    all_alike(outcome)


def test_who_keeps_its_own_parts_goes_on_with_its_last_checkpoint(tmp_path: Path, pristine_keys: Path) -> None:
    """Nobody else has them: what it learned since then is lost, and it says so."""
    settings = config(aggregation="none", save_every=1, learning_rate=0.05)
    found: dict[str, torch.Tensor] = {}
    before = run_split(config(aggregation="none", max_steps=LOST_AT, learning_rate=0.05), tmp_path / "before")
    expected = {name: value.clone() for name, value in before.clients[DEAD].learner.parameters.items()}
    take_up = Client._take_up_own

    def spy(self: Client) -> None:
        take_up(self)
        found.update({name: value.detach().clone() for name, value in self.learner.parameters.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "_take_up_own", spy)
        run(tmp_path / "run", pristine_keys, settings)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_who_shares_no_key_with_it_cannot_give_and_the_next_one_does(
    tmp_path: Path, pristine_keys: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pinned = keys_of(pristine_keys)

    def some_know_nobody(client: int) -> PeerKeys:
        peers = pinned(client)
        if client == 0:
            peers._authorised = {}
        return peers

    options = {"returning": 1, "waits_for_return": BACK_AT, "dying": frozenset({DEAD})}
    with caplog.at_level(logging.WARNING):
        outcome = run_split(config(), tmp_path, prepare=dies_once(), make_peers=some_know_nobody, **options)
    assert "client 0 cannot give client 1" in caplog.text
    assert steps_of(tmp_path, DEAD) == [1, 5, 6]
    all_alike(outcome)


def test_where_nobody_can_give_it_is_refused_and_the_run_goes_on(tmp_path: Path, pristine_keys: Path) -> None:
    pinned = keys_of(pristine_keys)

    def nobody_known(client: int) -> PeerKeys:
        peers = pinned(client)
        peers._authorised = {}
        return peers

    options = {"returning": 1, "waits_for_return": BACK_AT, "dying": frozenset({DEAD})}
    run_split(config(), tmp_path, prepare=dies_once(), make_peers=nobody_known, **options)
    assert steps_of(tmp_path, 0) == [1, 2, 3, 4, 5, 6]
    assert steps_of(tmp_path, DEAD) == [1]
    assert not events(tmp_path, "client_returned")
    assert "lacks what the clients have learned" in events(tmp_path, "client_lost")[-1]["why"]


# --- a checkpoint without a client, and another number of clients


def test_a_checkpoint_without_a_client_is_taken_up_by_all(tmp_path: Path, pristine_keys: Path) -> None:
    """The one that was away is given what the others have, so all go on as if it had only sat out."""
    away = config(save_every=3)
    run_split(
        away, tmp_path, prepare=dies_once(), dying=frozenset({DEAD}), make_peers=keys_of(pristine_keys), timeout_s=20
    )
    assert find(tmp_path, "checkpoint-3", lasting_agreement(away)).clients == (0, 2)
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    make_peers = keys_of(pristine_keys)
    outcome = run_split(away, tmp_path, start=3, newcomers=frozenset({DEAD}), make_peers=make_peers)
    absent = {step: {DEAD} for step in range(LOST_AT, 3)}
    losses, _ = plain_run(away, [(0, 1, 2)] * STEPS, absent)
    assert outcome.losses == pytest.approx(losses[3:], rel=1e-4)
    all_alike(outcome)


def test_a_resumed_run_may_have_more_clients_or_fewer(tmp_path: Path, pristine_keys: Path) -> None:
    """Two for three steps, then three, then one: a plain loop over whoever was there."""
    make_peers = keys_of(pristine_keys)
    data = {"data": DataConfig(train_examples=8, val_examples=0)}
    stages = [(2, 3), (3, 5), (1, 6)]
    configs = [
        Config(**{**vars(config(clients=clients, min_clients=0, save_every=1, max_steps=steps)), **data})
        for clients, steps in stages
    ]
    outcomes = [run_split(configs[0], tmp_path)]
    for before, settings in itertools.pairwise(configs):
        start = before.train.max_steps
        found = find(tmp_path, "latest", lasting_agreement(settings), steps=settings.train.max_steps)
        assert found.step == start
        newcomers = frozenset(range(settings.train.clients)) - set(found.clients or ())
        for path in tmp_path.glob("roles/*/metrics.jsonl"):
            path.unlink()
        outcomes.append(run_split(settings, tmp_path, start=start, newcomers=newcomers, make_peers=make_peers))
    absent = {step: {2} for step in range(3)} | {5: {1, 2}}
    losses, trained = plain_run(config(), [(0, 1, 2)] * 6, absent)
    assert [loss for outcome in outcomes for loss in outcome.losses] == pytest.approx(losses, rel=1e-4)
    for name, value in trained.items():
        torch.testing.assert_close(outcomes[-1].trained[name], value, rtol=0, atol=5e-5)


def test_where_the_trunk_has_something_of_each_client_their_number_stays() -> None:
    for train in ({"schedule": "replica"}, {"aggregation": "none"}):
        one, two = (lasting_agreement(config(clients=clients, **train)) for clients in (2, 3))
        assert one["train.clients"] != two["train.clients"]
