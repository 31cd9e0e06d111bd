"""A client notices gradients that do not follow from those it sent, and takes no honest trunk for a hostile one."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpc.config import AdapterConfig, Config, PrivacyConfig
from hpc.errors import ConfigError, TrunkSuspected
from hpc.privacy.attacks.fsha import Hijacker, HijackOptions
from hpc.privacy.defences.detector import LEAST_ROWS, SUSPICIOUS, Detector, alignment, stray_share
from tests.loopback import run_split
from tests.unit.hijack_case import duel, own_text, settings
from tests.unit.learned_case import config, public

ROWS = 4  # of a batch
IN_TIME = -(-LEAST_ROWS // ROWS)  # steps until there are enough rows to judge by


def watched(run: Config, mode: str = "stop") -> Config:
    return replace(run, privacy=PrivacyConfig(detector=mode))  # type: ignore[arg-type]


def hijacker(run: Config) -> Hijacker:
    embedding_VD = public(config(head_blocks=run.model.head_blocks)).embedding_VD
    return Hijacker(own_text(run), embedding_VD=embedding_VD, options=HijackOptions(hidden=64, shadow_tokens=256))


@pytest.mark.parametrize("schedule", ["serial", "client_batch", "pipelined", "replica"])
def test_no_schedule_of_an_honest_run_raises_an_alarm(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[float | None] = []
    returned = Detector.returned

    def listening(self: Detector, *args: object) -> None:
        returned(self, *args)  # type: ignore[arg-type]
        judged.append(self.alignment)

    monkeypatch.setattr(Detector, "returned", listening)
    base = config()
    steps, clients = IN_TIME + 2, 1 if schedule == "serial" else 2
    train = replace(base.train, schedule=schedule, max_steps=steps, learning_rate=1e-2, clients=clients)  # type: ignore[arg-type]
    outcome = run_split(watched(replace(base, train=train)), tmp_path)
    assert len(outcome.losses) == steps
    figures = [figure for figure in judged if figure is not None]
    assert figures
    assert min(figures) > SUSPICIOUS + 0.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_hijacker_is_stopped_as_soon_as_there_are_rows_to_judge_by(method: str, tmp_path: Path) -> None:
    run = watched(settings(method, head_blocks=1, rate=1e-3, steps=20))
    trunk, client, failures = duel(run, tmp_path, hijacker(run), 20)
    assert isinstance(failures[0], TrunkSuspected)
    assert len(trunk.seen) <= IN_TIME + 2
    assert f"step {len(trunk.seen)}: " in str(failures[0])
    assert "alignment" in str(failures[0])
    assert all(parameter.grad is None for parameter in client.head.parameters()), "nothing of it was used"


def test_a_careless_hijacker_is_stopped_at_the_first_step(tmp_path: Path) -> None:
    run = watched(settings("lora", head_blocks=1, rate=1e-3, steps=3))
    trunk, _, failures = duel(run, tmp_path, hijacker(run), 3, careful=False)
    assert isinstance(failures[0], TrunkSuspected)
    assert "no label can reach" in str(failures[0])
    assert len(trunk.seen) == 1


def test_a_warning_comes_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = watched(settings("lora", head_blocks=1, rate=1e-3, steps=6), "warn")
    with caplog.at_level(logging.WARNING, logger="hpc"):
        trunk, _, failures = duel(run, tmp_path, hijacker(run), 6)
    assert not failures
    assert len(trunk.seen) == 6
    assert sum("leak" in record.getMessage() for record in caplog.records) == 1


def test_alignment_is_one_for_a_rotation_and_near_zero_for_what_is_unrelated() -> None:
    draw = torch.Generator().manual_seed(0)
    sent = torch.randn(40, 16, generator=draw)
    rotation, _ = torch.linalg.qr(torch.randn(16, 16, generator=draw))
    assert alignment(sent, 3 * sent @ rotation) == pytest.approx(1.0)
    unrelated = alignment(sent, torch.randn(40, 16, generator=draw))
    assert unrelated is not None
    assert abs(unrelated) < 0.15
    assert alignment(sent, torch.ones(40, 16)) == 0.0, "what comes back is always the same"
    assert alignment(torch.ones(40, 16), sent) is None, "what is sent is always the same: nothing to tell apart"


def test_what_lies_behind_a_rows_end_is_stray() -> None:
    returned = torch.ones(2, 3, 4)
    assert stray_share(returned, [3, 3]) == 0.0
    assert stray_share(returned, [3, 0]) == pytest.approx(0.5**0.5)
    assert stray_share(torch.zeros(2, 3, 4), [0, 0]) == 0.0


def test_with_frozen_heads_there_is_nothing_to_watch_and_it_says_so() -> None:
    with pytest.raises(ConfigError, match="detector"):
        replace(config(), adapter=AdapterConfig(parts=["tail"]), privacy=PrivacyConfig(detector="warn"))
