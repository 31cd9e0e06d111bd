"""Which checkpoint is taken up, which is passed over, and what is refused, with the values named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.agreement import agreement, lasting_agreement
from hpc.checkpoint import MANIFEST, checkpoint_folder, commit, read_role, write_role
from hpc.config import AdapterConfig, Config, LinkConfig, ModelConfig, RunConfig, TrainConfig, TrunkConfig
from hpc.errors import CheckpointError
from hpc.preflight import check_output
from hpc.redeal import read_replicas
from hpc.resume import committed_steps, find

ROLES = ("trunk", "client-0", "client-1")


def config(**groups: Any) -> Config:
    """A tiny run, with the fields of whole groups given."""
    plain: dict[str, Any] = {
        "model": ModelConfig(name_or_path="tiny-llama"),
        "adapter": AdapterConfig(lora_r=4),
        "train": TrainConfig(max_steps=8),
    }
    changed = {name: dataclasses.replace(plain.get(name, given), **vars(given)) for name, given in groups.items()}
    return Config(**{**plain, **changed})


def tiny(**train: Any) -> Config:
    return config(train=TrainConfig(**{"max_steps": 8, **train}))


def make(folder: Path, step: int, *, attempt: str = "a", like: Config | None = None, finish: bool = True) -> None:
    for number, role in enumerate(ROLES):
        write_role(folder, step, role, {"x": torch.arange(6.0) + number + step}, {}, attempt=attempt)
    if finish:
        commit(folder, step, lasting_agreement(like) if like else {}, attempt=attempt)


def file_of(folder: Path, step: int, role: str) -> Path:
    return checkpoint_folder(folder, step) / f"{role}.safetensors"


def test_the_last_whole_one_is_used_and_a_half_written_one_is_named(tmp_path: Path) -> None:
    make(tmp_path, 2)
    make(tmp_path, 4)
    make(tmp_path, 6, finish=False)
    found = find(tmp_path, "latest", {})
    assert (found.step, found.attempt) == (4, "a")
    assert str(found).startswith("going on from checkpoint-4; passed over checkpoint-6: it has no manifest.json")
    assert find(tmp_path, "checkpoint-2", {}).step == 2
    with pytest.raises(
        CheckpointError, match=r"checkpoint-6: .* holds checkpoint-2, checkpoint-4; checkpoint-6: it has"
    ):
        find(tmp_path, "checkpoint-6", {})


def missing(folder: Path) -> None:
    file_of(folder, 4, "client-1").unlink()


def truncated(folder: Path) -> None:
    path = file_of(folder, 4, "client-1")
    path.write_bytes(path.read_bytes()[:-8])


def from_another_step(folder: Path) -> None:
    shutil.copy(file_of(folder, 2, "client-1"), file_of(folder, 4, "client-1"))


def from_another_role(folder: Path) -> None:
    shutil.copy(file_of(folder, 4, "client-0"), file_of(folder, 4, "client-1"))


def from_another_run(folder: Path) -> None:
    write_role(folder, 4, "client-1", {"x": torch.arange(6.0) + 6}, {}, attempt="b")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (missing, "is missing"),
        (truncated, "cannot be read"),
        (from_another_step, "belongs to step 2, not 4"),
        (from_another_role, "belongs to role client-0, not client-1"),
        (from_another_run, r"was written by another run, or another attempt of it \(b\)"),
    ],
)
def test_a_committed_checkpoint_with_a_wrong_file_is_not_whole(harm: Any, words: str, tmp_path: Path) -> None:
    """The search finds it out, and so does the role, which may be the only one to see its folder."""
    make(tmp_path, 2)
    make(tmp_path, 4)
    assert find(tmp_path, "latest", {}).step == 4
    harm(tmp_path)
    found = find(tmp_path, "latest", {})
    assert found.step == 2
    assert "client-1.safetensors" in found.passed_over[0]
    with pytest.raises(CheckpointError, match=rf"checkpoint-4 is not whole: .*client-1\.safetensors {words}"):
        find(tmp_path, "checkpoint-4", {})
    with pytest.raises(CheckpointError, match=rf"client-1\.safetensors {words}.*--run\.resume_from_checkpoint"):
        read_role(checkpoint_folder(tmp_path, 4), "client-1", attempt="a")


@pytest.mark.parametrize("place", ["value", "fact"])
def test_one_altered_bit_is_found(place: str, tmp_path: Path) -> None:
    write_role(tmp_path, 4, "trunk", {"x": torch.arange(6.0)}, {"loss_scale": 2.0})
    path = file_of(tmp_path, 4, "trunk")
    data = bytearray(path.read_bytes())
    data[-1 if place == "value" else data.index(b"0x1.0")] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"trunk\.safetensors was altered"):
        read_role(checkpoint_folder(tmp_path, 4), "trunk")


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"step": 2}', "\0\0"])
def test_a_broken_manifest_is_passed_over(text: str, tmp_path: Path) -> None:
    make(tmp_path, 2)
    make(tmp_path, 4)
    (checkpoint_folder(tmp_path, 4) / MANIFEST).write_text(text)
    found = find(tmp_path, "latest", {})
    assert found.step == 2
    assert "manifest.json" in found.passed_over[0]


def test_a_file_without_a_stamp_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    checkpoint_folder(tmp_path, 4).mkdir()
    save_file({"x": torch.ones(2)}, file_of(tmp_path, 4, "trunk"))
    with pytest.raises(CheckpointError, match="does not say what it belongs to"):
        read_role(checkpoint_folder(tmp_path, 4), "trunk")


def test_the_latest_is_the_one_committed_last(tmp_path: Path) -> None:
    """A run that went back to checkpoint-2 and came to 4 again does not go on from the 6 of before."""
    for step in (2, 4, 6, 4):
        make(tmp_path, step, attempt=f"before {step}")
    assert committed_steps(tmp_path) == [2, 6, 4]
    assert find(tmp_path, "latest", {}).step == 4


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (tiny(clients_per_round=1), "train.clients_per_round: then 0, now 1"),
        (tiny(schedule="pipelined"), "train.schedule: then client_batch, now pipelined"),
        (tiny(seed=5), "train.seed: then 0, now 5"),
        (tiny(weight_decay=0.5), "train.weight_decay: then 0.0, now 0.5"),
        (
            config(model=ModelConfig(name_or_path="smollm2-135m")),
            "model.name_or_path: then tiny-llama, now smollm2-135m",
        ),
        (config(model=ModelConfig(name_or_path="tiny-llama", head_blocks=2)), "model.head_blocks: then 1, now 2"),
        (config(adapter=AdapterConfig(lora_r=8)), "adapter.lora_r: then 4, now 8"),
        (config(adapter=AdapterConfig(lora_r=4, method="p_tuning_v2")), "adapter.method: then lora, now p_tuning_v2"),
    ],
)
def test_other_settings_are_refused_with_both_values(now: Config, words: str, tmp_path: Path) -> None:
    make(tmp_path, 5, like=config())
    with pytest.raises(CheckpointError) as refused:
        find(tmp_path, "latest", lasting_agreement(now))
    assert words in str(refused.value)


def test_a_checkpoint_may_go_on_elsewhere(tmp_path: Path) -> None:
    """Other links, other trunk ranks, another length: the link's ends must have some of these alike, not the run."""
    make(tmp_path, 5, like=config())
    moved = config(
        link=LinkConfig(transport="mpi", encryption="off"),
        trunk=TrunkConfig(ranks=2, deepspeed="zero2.json", activation_checkpointing=True),
        train=TrainConfig(max_steps=99, save_total_limit=2, eval_every=3),
    )
    assert find(tmp_path, "latest", lasting_agreement(moved), steps=99).step == 5
    assert agreement(moved)["trunk.ranks"] != agreement(config())["trunk.ranks"]


def test_a_run_that_would_end_before_its_checkpoint_is_refused(tmp_path: Path) -> None:
    make(tmp_path, 8, like=config())
    assert find(tmp_path, "latest", lasting_agreement(config()), steps=8).step == 8
    resumed = config(
        train=TrainConfig(max_steps=6), run=RunConfig(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    )
    with pytest.raises(CheckpointError, match=r"checkpoint-8 lies beyond the 6 steps .* --train\.max_steps"):
        check_output(resumed)
    check_output(resumed, coordinates=False)  # a role whose folder has no manifest is told where to begin


@pytest.mark.parametrize("which", ["newest", "checkpoint-x", ""])
def test_what_to_resume_must_be_a_checkpoint(which: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="latest or checkpoint-<step>"):
        find(tmp_path, which, {})


def test_an_empty_folder_has_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        find(tmp_path, "latest", {})


def test_the_manifest_is_readable_and_names_the_files(tmp_path: Path) -> None:
    make(tmp_path, 4, attempt="old", finish=False)
    file_of(tmp_path, 4, "trunk").rename(file_of(tmp_path, 4, "trunk-3"))  # left by an attempt with more ranks
    make(tmp_path, 4, like=config())
    manifest = json.loads((checkpoint_folder(tmp_path, 4) / MANIFEST).read_text())
    assert manifest["step"] == 4
    assert manifest["files"] == ["client-0.safetensors", "client-1.safetensors", "trunk.safetensors"]
    assert manifest["agreement"]["train.clients_per_round"] == "0"


def replicas(folder: Path, rank: int, clients: tuple[int, ...], attempt: str = "a") -> None:
    tensors = {f"replica-{client}/parameter/x": torch.full((2,), float(client)) for client in clients}
    write_role(folder, 4, f"trunk-{rank}", tensors, {"loss_scale": 1.0}, attempt=attempt)


@pytest.mark.parametrize(
    ("before", "rank", "now"),
    [
        ({0: (0, 1, 2)}, 1, (1,)),
        ({0: (0, 2), 1: (1,)}, 0, (0, 1, 2)),
        ({0: (0, 2), 1: (1, 3)}, 1, (1,)),
        ({0: (0, 2), 1: (1,)}, 2, (2,)),
    ],
)
def test_replicas_are_dealt_anew(before: Any, rank: int, now: tuple[int, ...], tmp_path: Path) -> None:
    for number, clients in before.items():
        replicas(tmp_path, number, clients)
    tensors, facts = read_replicas(checkpoint_folder(tmp_path, 4), now, rank=rank, attempt="a", learns=True)
    assert {name: value.tolist() for name, value in tensors.items() if int(name[8]) in now} == {
        f"replica-{client}/parameter/x": [client, client] for client in now
    }
    assert facts == {"loss_scale": 1.0}


def test_a_replica_that_this_rank_cannot_see_is_named(tmp_path: Path) -> None:
    replicas(tmp_path, 0, (0,))
    replicas(tmp_path, 1, (1,), attempt="killed")
    with pytest.raises(
        CheckpointError, match=r"client 1 \(trunk-1\.safetensors: written by another run.*shared folder"
    ):
        read_replicas(checkpoint_folder(tmp_path, 4), (0, 1), rank=0, attempt="a", learns=True)
