"""Roles run on hosts whose clocks may be an hour apart: nothing that a run reports or takes up depends on them."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import Attempt
from hpc.config import Config, TrainConfig
from hpc.report.events import FILE_NAME, EventLog, read_events, role_path
from hpc.report.finish import merge_events
from hpc.report.summary import summarise
from hpc.report.tensorboard import scalars
from hpc.resume import find
from hpc.saving import Saver
from tests.unit.report_case import config, read_run, write_run


def shift_clock(folder: Path, role: str, seconds: float) -> None:
    path = role_path(folder, role)
    events = [{**event, "time": event["time"] + seconds} for event in read_events(path)]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))


@pytest.fixture
def summaries(tmp_path: Path) -> tuple[dict[str, object], dict[str, object]]:
    """Of the same run, once with all clocks alike and once with the trunk's and a client's far apart."""
    found = []
    for name in ("alike", "apart"):
        folder = tmp_path / name
        write_run(folder)
        if name == "apart":
            shift_clock(folder, "trunk-0", -3600)
            shift_clock(folder, "client-0", 3600)
        events = read_run(folder)
        merge_events(events, folder / FILE_NAME)
        found.append(summarise(config(), events))
    return found[0], found[1]


def test_the_summary_is_the_same(summaries: tuple[dict[str, object], dict[str, object]]) -> None:
    alike, apart = summaries
    assert apart == alike


def test_the_merged_events_stand_in_the_same_order(
    summaries: tuple[dict[str, object], dict[str, object]], tmp_path: Path
) -> None:
    alike, apart = (
        [{key: value for key, value in event.items() if key != "time"} for event in read_events(path)]
        for path in (tmp_path / "alike" / "metrics.jsonl", tmp_path / "apart" / "metrics.jsonl")
    )
    assert apart == alike


def test_the_curves_of_the_run_keep_to_one_clock(tmp_path: Path) -> None:
    """TensorBoard can draw over time: a curve's points must not jump between two hosts' clocks."""
    write_run(tmp_path)
    shift_clock(tmp_path, "client-0", 3600)
    trunk = {event["step"]: event["time"] for event in read_run(tmp_path)["trunk-0"] if "step" in event}
    summary = summarise(config(), read_run(tmp_path))
    when = {(tag, step): at for tag, _, step, at in scalars(summary, read_run(tmp_path))}
    assert {step: when["loss", step] for step in trunk if step} == {step: at for step, at in trunk.items() if step}
    held_out = [when["held_out_loss", step] for step in (0, 4)]
    assert all(abs(at - min(trunk.values())) < 1800 for at in held_out)


def save(folder: Path, step: int) -> None:
    saver = Saver(
        config=Config(train=TrainConfig(max_steps=99)),
        folder=folder,
        role="trunk-0",
        attempt=Attempt(name="a"),
        log=EventLog(role_path(folder, "trunk-0")),
    )
    assert saver.write(step, "trunk", {"x": torch.ones(3)}, {})
    assert saver.commit(step)


def test_the_latest_checkpoint_is_the_last_one_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued job may go on, or back, on a host whose clock is behind."""
    from hpc.agreement import lasting_agreement

    agreement = lasting_agreement(Config(train=TrainConfig(max_steps=99)))
    save(tmp_path, 4)
    save(tmp_path, 8)
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    save(tmp_path, 12)
    assert find(tmp_path, "latest", agreement).step == 12
    save(tmp_path, 4)
    assert find(tmp_path, "latest", agreement).step == 4
