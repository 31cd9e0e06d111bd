"""Which checkpoints are kept; a checkpoint that cannot be written costs itself only, never the run."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hpc.checkpoint
from hpc.checkpoint import MANIFEST, Attempt, checkpoint_folder, write_role
from hpc.config import Config, TrainConfig
from hpc.errors import ProtocolError
from hpc.report.events import EventLog, read_events, role_path
from hpc.report.summary import summarise
from hpc.resume import committed_steps, find
from hpc.saving import Saver, from_payload, kept_steps, obstacle, to_payload
from tests.loopback import run_centralised, run_split
from tests.unit.test_checkpoint import tiny

ROLES = ("trunk-0", "client-0", "client-1")


class Roles:
    """The roles of a run, each with the folder that it sees."""

    def __init__(self, folders: dict[str, Path], limit: int) -> None:
        config = Config(train=TrainConfig(max_steps=99, save_total_limit=limit))
        self.folders = folders
        self.savers = {
            role: Saver(
                config=config,
                folder=folder,
                role=role,
                attempt=Attempt(name="a"),
                log=EventLog(role_path(folder, role)),
            )
            for role, folder in folders.items()
        }

    def save(self, step: int) -> None:
        for role, saver in self.savers.items():
            name = "trunk" if role == "trunk-0" else role
            assert saver.write(step, name, {"x": torch.ones(3)}, {})
        kept = self.savers["trunk-0"].commit(step)
        for saver in self.savers.values():
            saver.finish(step, kept)


def shared(folder: Path) -> dict[str, Path]:
    return dict.fromkeys(ROLES, folder)


def apart(folder: Path) -> dict[str, Path]:
    return {role: folder / role for role in ROLES}


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.glob("checkpoint-*/*"))


@pytest.mark.parametrize("deal", [shared, apart])
def test_the_oldest_beyond_the_limit_are_removed(deal: Callable[[Path], dict[str, Path]], tmp_path: Path) -> None:
    """Every role's files and empty folders go, whether the roles share a folder or not; half-written ones as well."""
    roles = Roles(deal(tmp_path), limit=2)
    for role, folder in roles.folders.items():
        write_role(folder, 1, "trunk" if role == "trunk-0" else role, {"x": torch.ones(3)}, {}, attempt="killed")
        (checkpoint_folder(folder, 1) / ".tmpXY").touch()
    for step in (2, 4, 6, 8):
        roles.save(step)
    assert committed_steps(roles.folders["trunk-0"]) == [6, 8]
    for role, folder in roles.folders.items():
        assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"], role
    every = {file for folder in set(roles.folders.values()) for file in left_in(folder)}
    files = [f"{name}.safetensors" for name in ("client-0", "client-1", "trunk")]
    assert every == {f"checkpoint-{step}/{name}" for step in (6, 8) for name in (*files, MANIFEST)}


def test_without_a_limit_all_stay(tmp_path: Path) -> None:
    roles = Roles(shared(tmp_path), limit=0)
    for step in (2, 4, 6, 8):
        roles.save(step)
    assert committed_steps(tmp_path) == [2, 4, 6, 8]


def test_the_newest_stays_though_the_run_went_back(tmp_path: Path) -> None:
    """What was resumed from stays until another is committed; then the ones committed last stay, not the highest."""
    roles = Roles(shared(tmp_path), limit=0)
    for step in (2, 4, 6):
        roles.save(step)
    again = Roles(shared(tmp_path), limit=1)
    assert committed_steps(tmp_path) == [2, 4, 6]
    again.save(3)
    assert committed_steps(tmp_path) == [3]


def test_a_removal_that_is_cut_short_leaves_no_committed_checkpoint(tmp_path: Path) -> None:
    roles = Roles(shared(tmp_path), limit=1)
    roles.save(2)
    for role, saver in roles.savers.items():
        saver.write(4, "trunk" if role == "trunk-0" else role, {"x": torch.ones(3)}, {})
    roles.savers["trunk-0"].commit(4)  # and killed before any file is removed
    assert (checkpoint_folder(tmp_path, 2) / "client-0.safetensors").exists()
    assert committed_steps(tmp_path) == [4]


def test_what_cannot_be_removed_is_only_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    roles = Roles(shared(tmp_path), limit=1)
    roles.save(2)
    plain = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.parent.name == "checkpoint-2":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        plain(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    with caplog.at_level(logging.WARNING, logger="hpc"):
        roles.save(4)
    assert "cannot remove its part of checkpoint-2" in caplog.text
    assert committed_steps(tmp_path) == [2, 4]
    assert find(tmp_path, "checkpoint-2", {**_agreement(roles)}).step == 2  # its manifest is there, so all of it is


def _agreement(roles: Roles) -> dict[str, str]:
    from hpc.agreement import lasting_agreement

    return lasting_agreement(roles.savers["trunk-0"]._config)


@pytest.mark.parametrize(("limit", "kept"), [(0, [3, 9, 5]), (1, [5]), (2, [9, 5]), (7, [3, 9, 5])])
def test_kept_are_the_last_committed(limit: int, kept: list[int]) -> None:
    assert kept_steps([3, 9, 5], limit) == kept


def test_why_there_is_no_checkpoint() -> None:
    assert obstacle(lost=0, unwritten={0: 0, 1: 0}, ranks=0) is None
    assert "client is lost" in str(obstacle(lost=1, unwritten={0: 1}, ranks=0))
    assert str(obstacle(lost=0, unwritten={0: 0, 1: 1, 2: 1}, ranks=1)).startswith("client-1, client-2, another trunk")


def test_clients_are_told_what_is_kept() -> None:
    assert from_payload(to_payload([4, 8])) == [4, 8]
    assert from_payload(to_payload([])) == []
    for wrong in (torch.ones(2), torch.zeros(1, 1, dtype=torch.int64), torch.empty(0, dtype=torch.int64)):
        with pytest.raises(ProtocolError, match="where kept checkpoints were due"):
            from_payload(wrong)


def full_disc(monkeypatch: pytest.MonkeyPatch, step: int, role: str) -> None:
    """Writing `role`'s file of one step fails half-way."""
    plain = hpc.checkpoint.save_file

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if path.parent.name == f"checkpoint-{step}" and path.name.startswith(f".{role}."):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(tensors, path, metadata=metadata)

    monkeypatch.setattr(hpc.checkpoint, "save_file", save_file)


@pytest.mark.parametrize(
    ("role", "schedule"),
    [("client-1", "client_batch"), ("trunk", "client_batch"), ("trunk-0", "replica"), ("client-0", "pipelined")],
)
def test_a_full_disc_costs_one_checkpoint(
    role: str,
    schedule: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tiny(schedule=schedule, max_steps=6, save_every=2, save_total_limit=1)
    full_disc(monkeypatch, 4, role)
    with caplog.at_level(logging.WARNING, logger="hpc"):
        outcome = run_split(config, tmp_path)
    assert len(outcome.losses) == 6
    assert committed_steps(tmp_path) == [6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-6"]
    assert caplog.text.count("no checkpoint at step 4") == (1 if role.startswith("trunk") else 2)
    events = {path.parent.name: read_events(path) for path in tmp_path.glob("roles/*/metrics.jsonl")}
    failed = summarise(config, events)["failed_checkpoints"]
    assert [entry["step"] for entry in failed] == [4]
    assert "No space left on device" in failed[0]["why"]
    assert ("client" in role) == (f"{role} could not write" in failed[0]["why"])


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full_disc(monkeypatch, 4, "client-0")
    run_split(tiny(max_steps=4, save_every=2, save_total_limit=1), tmp_path)
    assert left_in(tmp_path) == [
        f"checkpoint-2/{name}"
        for name in ("client-0.safetensors", "client-1.safetensors", MANIFEST, "trunk.safetensors")
    ]


def test_a_manifest_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last file of all: nothing of that checkpoint stays."""
    plain = Path.write_text

    def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.parent.name == "checkpoint-4" and MANIFEST in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    run_centralised(tiny(schedule="centralised", max_steps=6, save_every=2, save_total_limit=2), tmp_path)
    assert committed_steps(tmp_path) == [2, 6]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
