"""What a client must not send: other rows than agreed, and numbers that are none. The message names the client."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.client import Client
from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, TrainConfig, TrunkConfig
from hpc.errors import IdentityError, NonFinite, PeerLost, ProtocolError, TamperError
from hpc.link.kinds import Kind
from hpc.optim import MAX_SKIPS
from hpc.report.events import read_events, role_path
from tests.loopback import Outcome, run_split
from tests.unit.test_lost_clients import peers_in

SCHEDULES = ["client_batch", "pipelined", "replica"]
BAD = 1
Change = Callable[[Kind, int, torch.Tensor, tuple[int, ...]], tuple[torch.Tensor, tuple[int, ...]]]


def config(trunk: TrunkConfig | None = None, **train: Any) -> Config:
    values: dict[str, Any] = {"clients": 3, "max_steps": 5, "per_client_batch_size": 2, **train}
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=2),
        data=DataConfig(train_examples=8, val_examples=0, max_source_length=600),
        train=TrainConfig(**values),
        link=LinkConfig(timeout_s=20),
        trunk=trunk or TrunkConfig(),
    )


def sends(change: Change) -> Callable[[Client], None]:
    """Client BAD's hidden states go through `change` first."""

    def prepare(client: Client) -> None:
        if client.client_id != BAD:
            return
        send_rows = client.link.send_rows

        def changed(kind: Kind, step: int, hidden: torch.Tensor, lengths: Any, **more: Any) -> None:
            hidden, lengths = change(kind, step, hidden.clone(), tuple(lengths))
            send_rows(kind, step, hidden, lengths, **{**more, "sent": None})

        client.link.send_rows = changed  # type: ignore[method-assign]

    return prepare


def one_row_less(kind: Kind, step: int, hidden: Any, lengths: Any) -> Any:
    return (hidden[1:], lengths[1:]) if kind is Kind.SMASHED else (hidden, lengths)


def too_long(kind: Kind, step: int, hidden: Any, lengths: Any) -> Any:
    rows = (700,) * len(lengths)
    return (torch.zeros(len(rows), 700, hidden.shape[-1]), rows) if kind is Kind.SMASHED else (hidden, lengths)


def other_dtype(kind: Kind, step: int, hidden: Any, lengths: Any) -> Any:
    return hidden.bfloat16() if kind is Kind.SMASHED else hidden, lengths


def other_lengths_back(kind: Kind, step: int, hidden: Any, lengths: Any) -> Any:
    if kind is Kind.GRAD_TRUNK_OUT:
        lengths = tuple(length - 1 for length in lengths)
    return hidden, lengths


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_row_less, "client 1 sent SMASHED of"),
        (too_long, "client 1 sent SMASHED with a row of 700 tokens; at most 616 were agreed on"),
        (other_dtype, "client 1 sent SMASHED of .*bfloat16; due: .*float32"),
        (other_lengths_back, "client 1 sent GRAD_TRUNK_OUT with row lengths"),
    ],
)
def test_other_rows_than_agreed(schedule: str, change: Change, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProtocolError, match=message):
        run_split(config(schedule=schedule, per_client_batch_size=4), tmp_path, prepare=sends(change))


def test_a_bad_client_can_be_done_without(tmp_path: Path) -> None:
    outcome = run_split(
        config(schedule="pipelined", min_clients=2),
        tmp_path,
        prepare=sends(one_row_less),
        dying=frozenset({BAD}),
    )
    assert len(outcome.losses) == 5
    notes = [e for e in read_events(role_path(tmp_path, "trunk-0")) if e["event"] == "client_lost"]
    assert [note["client_id"] for note in notes] == [BAD]


def not_finite(kind_due: Kind, steps: range, value: float = math.nan) -> Change:
    def change(kind: Kind, step: int, hidden: Any, lengths: Any) -> Any:
        if kind is kind_due and step in steps:
            hidden[0, 0, 0] = value
        return hidden, lengths

    return change


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "what"), [(Kind.SMASHED, "smashed activations are"), (Kind.GRAD_TRUNK_OUT, "gradient is")]
)
def test_numbers_that_are_none_end_the_run(schedule: str, kind: Kind, what: str, tmp_path: Path) -> None:
    change = not_finite(kind, range(2, 3), math.inf)
    with pytest.raises(NonFinite, match=f"step 3: client 1: the {what} not finite; nobody stepped"):
        run_split(config(schedule=schedule), tmp_path, prepare=sends(change))


def skipped(folder: Path) -> list[int]:
    return [e["step"] for e in read_events(role_path(folder, "trunk-0")) if e["event"] == "step" and e["skipped"]]


@pytest.mark.parametrize(
    ("schedule", "stage"),
    [*(("client_batch", stage) for stage in (0, 1, 2, 3)), *(("pipelined", stage) for stage in (0, 1, 2))],
)
def test_or_that_step_is_left_out_by_everybody(schedule: str, stage: int, tmp_path: Path) -> None:
    """As if it had not been: AdamW's moments and parameters are those of the step before."""
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    trunk = TrunkConfig(deepspeed=str(settings) if stage else None)
    train: dict[str, Any] = {"schedule": schedule, "on_nonfinite": "skip", "lr_scheduler": "constant"}
    change = not_finite(Kind.SMASHED, range(4, 5))
    outcome = run_split(config(trunk, **train), tmp_path / "bad", prepare=sends(change))
    assert skipped(tmp_path / "bad") == [5]
    (note,) = [e for e in read_events(role_path(tmp_path / "bad", "trunk-0")) if e["event"] == "nonfinite"]
    assert (note["client_id"], note["what"], note["step"]) == (BAD, "activations", 5)
    without = run_split(config(trunk, **{**train, "max_steps": 4}), tmp_path / "short")
    assert outcome.losses[:4] == without.losses
    for name in without.clients[0].learner.parameters:
        assert torch.equal(outcome.trained[name], without.trained[name]), name
    if stage < 3:  # stage 3 leaves an empty shell of the trunk's
        assert_same(outcome, without)


def assert_same(one: Outcome, other: Outcome) -> None:
    assert all(torch.equal(one.trained[name], value) for name, value in other.trained.items())


@pytest.mark.parametrize("schedule", ["client_batch", "pipelined"])
def test_work_goes_on_after_a_step_that_was_left_out(schedule: str, tmp_path: Path) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    outcome = run_split(
        config(TrunkConfig(deepspeed=str(settings)), schedule=schedule, on_nonfinite="skip", max_steps=8),
        tmp_path,
        prepare=sends(not_finite(Kind.GRAD_TRUNK_OUT, range(2, 4))),
    )
    assert skipped(tmp_path) == [3, 4]
    assert all(math.isfinite(loss) for loss in outcome.losses)
    assert outcome.losses[-1] < outcome.losses[0]


def test_replicas_of_the_others_step(tmp_path: Path) -> None:
    train: dict[str, Any] = {"schedule": "replica", "on_nonfinite": "skip", "aggregation": "none", "sync_every": 9}
    change = not_finite(Kind.SMASHED, range(5))
    bad = run_split(config(**train), tmp_path / "bad", prepare=sends(change))
    good = run_split(config(**train), tmp_path / "good")
    for client in (0, 2):
        found, expected = (outcome.clients[client].learner.parameters for outcome in (bad, good))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_that_only_leaves_out_steps_ends(tmp_path: Path) -> None:
    train: dict[str, Any] = {"schedule": "client_batch", "on_nonfinite": "skip", "max_steps": 3 * MAX_SKIPS}
    with pytest.raises(NonFinite, match=f"{MAX_SKIPS} steps in a row were left out"):
        run_split(config(**train), tmp_path, prepare=sends(not_finite(Kind.SMASHED, range(100))))


def test_masks_missing_in_a_secure_round(tmp_path: Path, pristine_keys: Path) -> None:
    """A server that keeps a key back cannot have a client contribute without masks."""
    peers = peers_in(pristine_keys)
    add = peers[0].add
    peers[0].add = lambda message: 2 if b'"client_id":2' in message else add(message)  # type: ignore[method-assign]
    with pytest.raises(IdentityError, match="masks missing in a secure round: client-2 has not given its key"):
        run_split(config(schedule="replica", secure_aggregation=True), tmp_path, peers=peers)


def test_a_gradient_that_fixed_point_cannot_hold_names_its_client(tmp_path: Path, pristine_keys: Path) -> None:
    """Under masks a client that is not finite sends zeros, and says so."""
    train: dict[str, Any] = {"schedule": "client_batch", "secure_aggregation": True, "on_nonfinite": "stop"}

    def prepare(client: Client) -> None:
        if client.client_id == BAD:
            flat = client.learner.flat_gradient
            client.learner.flat_gradient = lambda: flat() * math.nan  # type: ignore[method-assign]
            client.learner.square_sum = lambda: math.nan  # type: ignore[method-assign]

    with pytest.raises(NonFinite, match="client 1: the gradient is not finite"):
        run_split(config(**train), tmp_path, peers=peers_in(pristine_keys), prepare=prepare)


def test_under_masks_what_is_not_finite_lays_nobody_open(
    tmp_path: Path, pristine_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were zeros sent in its place, the sum would be the other clients' alone."""
    from hpc.server_sum import ServedSum

    sums: list[torch.Tensor] = []
    result = ServedSum.result

    def noted(self: ServedSum) -> torch.Tensor:
        sums.append(result(self))
        return sums[-1]

    monkeypatch.setattr(ServedSum, "result", noted)
    train: dict[str, Any] = {"clients": 2, "max_steps": 1, "secure_aggregation": True, "on_nonfinite": "skip"}

    def prepare(client: Client) -> None:
        flat = client.learner.flat_gradient
        if client.client_id == BAD:
            client.learner.flat_gradient = lambda: flat() * math.nan  # type: ignore[method-assign]

    run_split(config(schedule="client_batch", **train), tmp_path, peers=peers_in(pristine_keys), prepare=prepare)
    assert skipped(tmp_path) == [1]
    assert float(sums[0].abs().median()) > 1e3  # noise over the whole range; gradients are far below


def test_clients_that_are_told_different_divisors_reveal_nothing(tmp_path: Path, pristine_keys: Path) -> None:
    """A server could make all gradients but one vanish in the sum."""

    def prepare(client: Client) -> None:
        recv = client.link.recv

        def lied_to(kind: Kind, step: int, **more: Any) -> Any:
            frame = recv(kind, step, **more)
            if kind is Kind.TRUNK_OUT and client.client_id == BAD:
                return replace(frame, header=replace(frame.header, weight=1e30))
            return frame

        client.link.recv = lied_to  # type: ignore[method-assign]

    secure = config(schedule="client_batch", secure_aggregation=True)
    with pytest.raises((TamperError, PeerLost), match="does not attest"):
        run_split(secure, tmp_path, peers=peers_in(pristine_keys), prepare=prepare)


def test_fp16_forgives_overflow_only(tmp_path: Path) -> None:
    """A smaller loss scale cannot mend activations that are no numbers."""
    model = ModelConfig(name_or_path="tiny-llama", dtype="float16")
    half = replace(config(schedule="client_batch"), model=model)
    with pytest.raises(NonFinite, match="client 1: the smashed activations are not finite"):
        run_split(half, tmp_path, prepare=sends(not_finite(Kind.SMASHED, range(1, 9))))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_before_the_first_step_that_was_taken(stage: int, tmp_path: Path) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    trunk = TrunkConfig(deepspeed=str(settings) if stage else None)
    train: dict[str, Any] = {"schedule": "client_batch", "on_nonfinite": "skip", "max_steps": 3, "save_every": 1}
    bad = sends(not_finite(Kind.SMASHED, range(1)))
    whole = run_split(config(trunk, **train), tmp_path / "run", prepare=bad)
    assert skipped(tmp_path / "run") == [1]
    for path in (tmp_path / "run").glob("roles/*/metrics.jsonl"):
        path.unlink()
    assert run_split(config(trunk, **train), tmp_path / "run", start=1).losses == whole.losses[1:]
