"""What is recorded is what crossed the links, and what was true of it; nobody else can read it."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.client import Client
from hpc.config import (
    AdapterConfig,
    Config,
    DataConfig,
    LinkConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
    TrunkConfig,
)
from hpc.data.dataset import load_client_data
from hpc.errors import ConfigError, DataError
from hpc.link.kinds import Kind
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.recorded import first_rows, load, load_sealed, load_seen
from hpc.privacy.recording import TrunkRecorder, name_of, write
from tests.loopback import run_split

STEPS = 2  # of three
CLIENTS = (0, 1)
SCHEDULES: dict[str, dict[str, Any]] = {
    "client_batch": {},
    "pipelined": {"micro_batches": 2},
    "serial": {"aggregation": "none"},
    "replica": {},
}


def config(record_steps: int = STEPS, parts: tuple[Any, ...] = ("head", "trunk", "tail"), **train: Any) -> Config:
    values: dict[str, Any] = {"clients": 2, "max_steps": 3, "per_client_batch_size": 2, "learning_rate": 0.01, **train}
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=2, parts=list(parts)),
        data=DataConfig(train_examples=4, val_examples=0),
        train=TrainConfig(**values),
        privacy=PrivacyConfig(record_steps=record_steps),
    )


class Overheard:
    """What each client asks its link to send, and what its transport gets."""

    def __init__(self) -> None:
        self.rows: dict[tuple[int, Kind, int, int], torch.Tensor] = {}
        self.messages: list[bytes] = []

    def prepare(self, client: Client) -> None:
        send_rows = client.link.send_rows

        def overheard(kind: Kind, step: int, hidden_BTD: torch.Tensor, lengths: Any, **more: Any) -> None:
            rows = [row_TD[:length] for row_TD, length in zip(hidden_BTD, lengths, strict=True)]
            self.rows[client.client_id, kind, step, more.get("micro", 0)] = torch.cat(rows).clone()
            send_rows(kind, step, hidden_BTD, lengths, **more)

        client.link.send_rows = overheard  # type: ignore[method-assign]

    def wrap(self, transport: Any) -> Any:
        send = transport.send

        def overheard(buffer: torch.Tensor) -> Any:
            self.messages.append(bytes(buffer.numpy().tobytes()))
            return send(buffer)

        transport.send = overheard
        return transport


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_what_is_recorded_is_what_was_sent(schedule: str, tmp_path: Path) -> None:
    own, heard = config(schedule=schedule, **SCHEDULES[schedule]), Overheard()
    run_split(own, tmp_path, prepare=heard.prepare, wrap=heard.wrap)
    micros = own.train.resolved_micro_batches
    for client in CLIENTS:
        samples = load(tmp_path, client)
        sent = sorted(key for key in heard.rows if key[0] == client and key[1] is Kind.SMASHED and key[2] < STEPS)
        assert len(samples) == len(sent) == (STEPS * micros if schedule != "serial" else 1)
        for sample, (_, _, step, micro) in zip(samples, sent, strict=True):
            assert sample.seen.step == step
            assert torch.equal(sample.seen.smashed_SD, heard.rows[client, Kind.SMASHED, step, micro])
            assert sample.seen.grad_trunk_out_SD is not None
            assert torch.equal(sample.seen.grad_trunk_out_SD, heard.rows[client, Kind.GRAD_TRUNK_OUT, step, micro])
        for sealed in load_sealed(tmp_path, client):
            assert (
                sum(map(len, sealed.messages)) > 4 * heard.rows[client, Kind.SMASHED, sealed.step, sealed.micro].numel()
            )
            assert all(bytes(message.numpy().tobytes()) in heard.messages for message in sealed.messages)
        seen = load_seen(tmp_path, client)
        assert all(torch.equal(a.smashed_SD, b.seen.smashed_SD) for a, b in zip(seen, samples, strict=True))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    run_split(config(), folder)
    return folder


def test_the_truth_is_the_clients_batch(run_folder: Path) -> None:
    own = config()
    tokenizer = load_tokenizer(ModelBuilder.of(own).resolver)
    for client in CLIENTS:
        data = load_client_data(own, client, tokenizer)
        for step, sample in enumerate(load(run_folder, client)):
            batch = data.train_batch(step)
            rows = [ids_T[:length].tolist() for ids_T, length in zip(batch.ids_BT, batch.lengths, strict=True)]
            assert [list(row) for row in sample.truth.ids] == rows
            assert sample.seen.lengths == batch.lengths
            assert sample.seen.label_tokens == len(sample.truth.label_ids) == batch.label_tokens
            for row, position, label in zip(
                sample.truth.label_rows, sample.truth.label_positions, sample.truth.label_ids, strict=True
            ):
                assert rows[row][position + 1] == label


def test_rows_that_the_servers_cache_has_are_recorded_whole(tmp_path: Path) -> None:
    """In the second epoch nothing is sent, so the recording must come from the cache."""
    own = replace(config(4, ("trunk", "tail"), max_steps=4), trunk=TrunkConfig(smashed_cache_mib=8))
    run_split(own, tmp_path)
    head = ModelBuilder.of(own).part("head", adapted=False)
    sizes = []
    for sample, sealed in zip(load(tmp_path, 0), load_sealed(tmp_path, 0), strict=True):
        sizes.append(sum(map(len, sealed.messages)))
        for ids, row_TD in zip(sample.truth.ids, sample.seen.rows_TD(), strict=True):
            expected_TD = head(torch.tensor([ids]))[0].detach()
            torch.testing.assert_close(row_TD, expected_TD, rtol=1e-5, atol=1e-6)
    assert max(sizes[2:]) < 1024 < min(sizes[:2])


def test_only_the_owner_can_read_recordings(run_folder: Path) -> None:
    files = sorted((run_folder / "recordings").rglob("*.safetensors"))
    assert len(files) == 3 * STEPS * len(CLIENTS)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert {stat.S_IMODE(path.parent.stat().st_mode) for path in files} == {0o700}
    assert not [path for path in (run_folder / "recordings").rglob("*") if path.name.startswith(".")]


def test_a_run_without_recordings_leaves_none_and_removes_those_of_an_earlier_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_split(config(1, max_steps=1), tmp_path)
    warned = [record.getMessage() for record in caplog.records if "private text" in record.getMessage()]
    assert len(warned) == 1 + len(CLIENTS)
    assert list((tmp_path / "recordings").rglob("*.safetensors"))
    run_split(config(0, max_steps=1), tmp_path)
    assert not list((tmp_path / "recordings").rglob("*.safetensors"))
    with pytest.raises(DataError, match=r"has no recordings .* run it again with --privacy.record_steps N"):
        load(tmp_path, 0)


def test_an_earlier_attempts_further_ranks_are_forgotten(tmp_path: Path) -> None:
    """Theirs would be taken for this run's."""
    paths = [tmp_path / "recordings" / f"trunk-{rank}" / name_of(0, step, 0) for rank in range(3) for step in (1, 2)]
    for path in paths:
        write(path, {"lengths": torch.tensor([1])})
    own = replace(config(), trunk=TrunkConfig(ranks=2))
    TrunkRecorder.of(own, tmp_path, rank=0, start=2)
    kept = [f"{path.parent.name} {path.name.split('.')[1]}" for path in paths if path.exists()]
    assert kept == ["trunk-0 step-1", "trunk-1 step-1", "trunk-1 step-2", "trunk-2 step-1"]


def test_a_client_that_was_not_recorded_is_named(run_folder: Path) -> None:
    with pytest.raises(DataError, match="recordings of clients 0, 1, and none of 7"):
        load(run_folder, 7)
    with pytest.raises(DataError, match="is no folder"):
        load(run_folder / "elsewhere", 0)


def test_a_broken_file_is_named(run_folder: Path, tmp_path: Path) -> None:
    for kind in ("trunk-0", "client-0"):
        for source in (run_folder / "recordings").rglob("*.safetensors"):
            target = tmp_path / kind / source.relative_to(run_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
        broken = tmp_path / kind / "recordings" / kind / "client-0.step-1.micro-0.safetensors"
        broken.write_bytes(broken.read_bytes()[:100])
        with pytest.raises(DataError, match=rf"{kind}/client-0.step-1.micro-0.safetensors is broken"):
            load(tmp_path / kind, 0)


def test_a_batch_that_one_side_lacks_is_left_out(
    run_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for source in (run_folder / "recordings").rglob("*.safetensors"):
        target = tmp_path / source.relative_to(run_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    (tmp_path / "recordings" / "client-0" / "client-0.step-0.micro-0.safetensors").unlink()
    assert [sample.seen.step for sample in load(tmp_path, 0)] == [1]
    assert "step 0, micro-batch 0 of client 0 was recorded by one side only" in caplog.text


def test_first_rows_cuts_a_batch_with_all_that_belongs_to_it(run_folder: Path) -> None:
    whole = load(run_folder, 0)
    cut = first_rows(whole, 3)
    assert [len(sample.truth.ids) for sample in cut] == [2, 1]
    last, length = cut[-1], whole[1].seen.lengths[0]
    assert last.seen.smashed_SD.shape[0] == length == len(last.truth.ids[0])
    assert last.seen.grad_trunk_out_SD is not None
    assert torch.equal(last.seen.grad_trunk_out_SD, whole[1].seen.grad_trunk_out_SD[:length])  # type: ignore[index]
    assert set(last.truth.label_rows) == {0}
    assert last.truth.label_ids == whole[1].truth.label_ids[: len(last.truth.label_ids)]
    assert first_rows(whole, 0) == whole


def test_nothing_crosses_a_link_in_a_centralised_run() -> None:
    with pytest.raises(ConfigError, match="nothing crosses a link"):
        config(schedule="centralised")


def test_without_encryption_too_the_bytes_are_those_on_the_wire(tmp_path: Path) -> None:
    own = replace(config(1, max_steps=1), link=LinkConfig(encryption="off"))
    run_split(own, tmp_path)
    sealed, seen = load_sealed(tmp_path, 0)[0], load_seen(tmp_path, 0)[0]
    joined = b"".join(bytes(message.numpy().tobytes()) for message in sealed.messages)
    assert joined.endswith(seen.smashed_SD.numpy().tobytes())
