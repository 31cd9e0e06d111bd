"""A client that is gone: its step is dropped for it, the others go on, and a secure round still comes off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.client import Client
from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, TrainConfig
from hpc.errors import LinkError, PeerLost, ProtocolError
from hpc.link.identity import Authorised, client_name, load_private
from hpc.link.kinds import Kind
from hpc.link.peers import PeerKeys
from hpc.report.events import read_events, role_path
from hpc.resume import committed_steps
from hpc.schedule import cohort
from tests.loopback import Outcome, run_split

STEPS = 6
DEAD = 1


class Died(Exception):
    """What a killed process would not even say."""


def config(**train: Any) -> Config:
    values: dict[str, Any] = {"clients": 3, "min_clients": 2, "max_steps": STEPS, "per_client_batch_size": 2, **train}
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=2),
        data=DataConfig(train_examples=8, val_examples=0),
        train=TrainConfig(**values),
        link=LinkConfig(timeout_s=20),
    )


def dies_before(kind: Kind, step: int) -> Callable[[Client], None]:
    """Client DEAD closes its link instead of sending this frame."""

    def prepare(client: Client) -> None:
        if client.client_id != DEAD:
            return
        channel, send = client.link.channel, client.link.channel.send

        def dying_send(header: Any, tensor: torch.Tensor | None = None) -> None:
            if header.kind is kind and header.step == step:
                channel._close("dead")
                raise Died
            send(header, tensor)

        channel.send = dying_send  # type: ignore[method-assign]

    return prepare


def run(folder: Path, kind: Kind, step: int = 2, *, peers: Any = None, **train: Any) -> Outcome:
    return run_split(config(**train), folder, prepare=dies_before(kind, step), dying=frozenset({DEAD}), peers=peers)


def peers_in(folder: Path) -> dict[int, PeerKeys]:
    pinned = Authorised.load(folder).by_client_id()
    return {k: PeerKeys(k, load_private(folder, client_name(k)), pinned, "run") for k in range(3)}


def steps_of(folder: Path, client: int) -> list[int]:
    return [e["step"] for e in read_events(role_path(folder, f"client-{client}")) if e["event"] == "step"]


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica"])
@pytest.mark.parametrize("kind", [Kind.SMASHED, Kind.GRAD_TRUNK_OUT, Kind.PART_GRADS])
def test_the_others_go_on(schedule: str, kind: Kind, tmp_path: Path) -> None:
    outcome = run(tmp_path, kind, schedule=schedule)
    assert [steps_of(tmp_path, client) for client in range(3)] == [[1, 2, 3, 4, 5, 6], [1, 2], [1, 2, 3, 4, 5, 6]]
    (lost,) = [e for e in read_events(role_path(tmp_path, "trunk-0")) if e["event"] == "client_lost"]
    assert (lost["client_id"], lost["step"]) == (DEAD, 3)
    if schedule != "replica":  # the survivors still share every gradient
        first, _, last = (client.learner.parameters for client in outcome.clients)
        assert all(torch.equal(first[name], last[name]) for name in first)


def norms(folder: Path) -> list[float]:
    return [e["grad_norm"] for e in read_events(role_path(folder, "trunk-0")) if e["event"] == "step"]


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        ("client_batch", Kind.GRAD_TRUNK_OUT),
        ("pipelined", Kind.GRAD_TRUNK_OUT),
        ("pipelined", Kind.PART_GRADS),
    ],
)
def test_a_lost_clients_rows_count_for_nothing(schedule: str, kind: Kind, tmp_path: Path) -> None:
    """Lost at its last moment in the step, or before it: the survivors' step is the same, up to rounding."""
    train = {"schedule": schedule, "max_grad_norm": 0.0}
    early = run(tmp_path / "early", Kind.SMASHED, **train)
    late = run(tmp_path / "late", kind, **train)
    assert norms(tmp_path / "late") == pytest.approx(norms(tmp_path / "early"), rel=1e-5)
    for name, value in early.trained.items():
        torch.testing.assert_close(late.trained[name], value, rtol=0, atol=2e-5)


def test_a_step_is_left_out_if_only_half_of_a_clients_gradient_came(tmp_path: Path) -> None:
    """`client_batch`: its rows are in the trunk's gradient already, and what its own parts would add is lost."""
    train = {"schedule": "client_batch", "lr_scheduler": "constant"}
    lost = run(tmp_path / "lost", Kind.PART_GRADS, step=STEPS - 1, **train)
    short = run_split(config(**{**train, "max_steps": STEPS - 1}), tmp_path / "short")
    assert all(torch.equal(lost.trained[name], value) for name, value in short.trained.items())


@pytest.mark.parametrize(
    ("schedule", "aggregation"),
    [
        ("client_batch", "gradient"),
        ("client_batch", "fedavg"),
        ("pipelined", "gradient"),
        ("pipelined", "fedavg"),
        ("replica", "fedavg"),
    ],
)
def test_a_round_whose_whole_cohort_is_lost_changes_nothing(schedule: str, aggregation: str, tmp_path: Path) -> None:
    train: dict[str, Any] = {
        "schedule": schedule,
        "aggregation": aggregation,
        "clients_per_round": 1,
        "min_clients": 1,
        "lr_scheduler": "constant",
        "weight_decay": 0.1,
    }
    settings = config(**train).train
    fatal = next(step for step in range(1, 99) if cohort(settings, step) == (DEAD,) != cohort(settings, step - 1))
    lost = run(tmp_path / "lost", Kind.SMASHED, step=fatal, **train, max_steps=fatal + 1)
    before = run_split(config(**train, max_steps=fatal), tmp_path / "before")
    for name, value in before.trained.items():
        torch.testing.assert_close(lost.trained[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined", "replica"])
def test_a_client_that_hangs_takes_nobody_with_it(schedule: str, tmp_path: Path) -> None:
    """The others wait as long as the trunk waits for the silent one; their deadlines must not run out."""

    def prepare(client: Client) -> None:
        send = client.link.channel.send

        def hanging_send(header: Any, tensor: torch.Tensor | None = None) -> None:
            if client.client_id == DEAD and header.kind is Kind.SMASHED and header.step == 1:
                time.sleep(3600)
            send(header, tensor)

        client.link.channel.send = hanging_send  # type: ignore[method-assign]

    found = Config(**{**vars(config(schedule=schedule)), "link": LinkConfig(timeout_s=4)})
    run_split(found, tmp_path, prepare=prepare, dying=frozenset({DEAD}), timeout_s=4)
    assert steps_of(tmp_path, 0) == steps_of(tmp_path, 2) == [1, 2, 3, 4, 5, 6]
    (lost,) = [e for e in read_events(role_path(tmp_path, "trunk-0")) if e["event"] == "client_lost"]
    assert lost["client_id"] == DEAD
    assert "silent" in lost["why"]


def test_a_client_that_dies_with_its_work_done_harms_nobody(tmp_path: Path) -> None:
    run(tmp_path, Kind.BYE, step=0)
    assert [steps_of(tmp_path, client) for client in range(3)] == [[1, 2, 3, 4, 5, 6]] * 3


@pytest.mark.parametrize("aggregation", ["gradient", "none"])
def test_a_checkpoint_needs_every_client_only_where_nobody_else_has_its_parts(aggregation: str, tmp_path: Path) -> None:
    run(tmp_path, Kind.SMASHED, step=3, save_every=2, aggregation=aggregation)
    assert committed_steps(tmp_path) == ([2, 4, 6] if aggregation == "gradient" else [2])


def test_without_leave_a_lost_client_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises((PeerLost, LinkError)):
        run(tmp_path, Kind.SMASHED, min_clients=0)


def test_too_few_that_are_left_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(LinkError, match=r"2 of 3 clients are left; --train\.min_clients is 3"):
        run(tmp_path, Kind.SMASHED, min_clients=3)


@pytest.mark.parametrize(
    ("schedule", "aggregation", "kind"),
    [
        ("client_batch", "gradient", Kind.MASKED),
        ("client_batch", "fedavg", Kind.MASKED),
        ("replica", "fedavg", Kind.MASKED),
        ("replica", "fedavg", Kind.SMASHED),
    ],
)
def test_a_secure_round_comes_off_without_the_lost_client(
    schedule: str, aggregation: str, kind: Kind, tmp_path: Path, pristine_keys: Path
) -> None:
    """It equals the plain round in which the same client was lost at the same place."""
    train: dict[str, Any] = {"schedule": schedule, "aggregation": aggregation, "sync_every": 2}
    masked = run(tmp_path / "masked", kind, peers=peers_in(pristine_keys), secure_aggregation=True, **train)
    plain_kind = {Kind.MASKED: Kind.PARTS if aggregation == "fedavg" else Kind.PART_GRADS}.get(kind, kind)
    plain = run(tmp_path / "plain", plain_kind, **train)
    assert steps_of(tmp_path / "masked", 0) == [1, 2, 3, 4, 5, 6]
    for name, value in plain.trained.items():
        if not name.startswith(f"replica-{DEAD}/"):
            torch.testing.assert_close(masked.trained[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [Kind.ATTEST, Kind.REVEAL])
def test_masks_stay_on_if_a_client_is_lost_after_its_vector_came(
    kind: Kind, tmp_path: Path, pristine_keys: Path
) -> None:
    """Better no sum than one that lays somebody open: the run ends and says why."""
    with pytest.raises(ProtocolError, match=r"tags came from|seeds from"):
        run(
            tmp_path,
            kind,
            peers=peers_in(pristine_keys),
            schedule="replica",
            sync_every=2,
            secure_aggregation=True,
        )
