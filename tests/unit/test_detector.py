"""A client notices gradients that do not follow from those it sent, and takes no honest trunk for a hostile one.

The detector's limits were not chosen on these runs: their seed is 0 (see `hpc.privacy.defences.detector`).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import AdapterConfig, Config, PrivacyConfig
from hpc.errors import ConfigError
from hpc.privacy.attack_options import HijackOptions
from hpc.privacy.attacks.fsha import Hijacker
from hpc.privacy.defences.detector import LEAST_ROWS, Detector, alignment, beyond, stray_share
from hpc.ragged import pack
from tests.loopback import run_split
from tests.unit.hijack_case import duel, own_text, settings
from tests.unit.learned_case import config, public
from tests.unit.test_lost_clients import peers_in

ROWS = 4  # of a batch
IN_TIME = -(-LEAST_ROWS // ROWS)  # steps until there are enough rows to judge by


def watched(run: Config, mode: str = "stop") -> Config:
    return replace(run, privacy=PrivacyConfig(detector=mode))  # type: ignore[arg-type]


def hijacker(run: Config) -> Hijacker:
    embedding_VD = public(config(head_blocks=run.model.head_blocks)).embedding_VD
    return Hijacker(own_text(run), embedding_VD=embedding_VD, options=HijackOptions(hidden=64, shadow_tokens=256))


NOISY = {"clip_norm": 1.0, "noise_multiplier": 0.3, "gradient_clip_norm": 1e-3, "gradient_noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("schedule", "defences"),
    [
        pytest.param("serial", {}, marks=pytest.mark.long),
        ("client_batch", NOISY),
        pytest.param("pipelined", {}, marks=pytest.mark.long),
        ("replica", {"label_protection": "max_norm"}),
    ],
)
def test_no_schedule_of_an_honest_run_raises_an_alarm(
    schedule: str,
    defences: dict[str, Any],
    tmp_path: Path,
    pristine_keys: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    judged: list[float | None] = []
    returned = Detector.returned

    def listening(self: Detector, *args: Any) -> None:
        returned(self, *args)
        judged.append(self.beyond)

    monkeypatch.setattr(Detector, "returned", listening)
    base, is_serial = config(), schedule == "serial"
    steps = (2 if is_serial else 1) * (IN_TIME + 2)
    micro = 2 if schedule == "pipelined" else 0
    train = replace(
        base.train,
        schedule=schedule,  # type: ignore[arg-type]
        max_steps=steps,
        learning_rate=1e-2,
        micro_batches=micro,
    )
    run = replace(base, train=train, privacy=PrivacyConfig(detector="stop", **defences))
    outcome = run_split(run, tmp_path, peers=peers_in(pristine_keys) if is_serial else None)
    assert len(outcome.losses) == steps
    assert [figure for figure in judged if figure is not None], "nothing was judged"


def test_what_is_compared_is_what_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With noise on the gradients that go back, the detector must not know the ones without."""
    known: list[torch.Tensor] = []
    sent = Detector.sent

    def listening(self: Detector, piece: int, grad_BTD: torch.Tensor) -> None:
        sent(self, piece, grad_BTD)
        known.append(self._sent[piece].clone())

    monkeypatch.setattr(Detector, "sent", listening)
    run = settings("lora", head_blocks=1, rate=1e-3, steps=1)
    run = replace(run, privacy=PrivacyConfig(detector="stop", **NOISY))
    (seen,) = duel(run, tmp_path, None).trunk.seen
    assert seen.grad_trunk_out_SD is not None
    assert torch.equal(pack(known[0], seen.lengths), seen.grad_trunk_out_SD)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_hijacker_is_stopped_as_soon_as_there_are_rows_to_judge_by(method: str, tmp_path: Path) -> None:
    run = watched(settings(method, head_blocks=1, rate=1e-3, steps=8))
    left = duel(run, tmp_path, hijacker(run))
    assert left.suspected is not None
    assert len(left.trunk.seen) <= IN_TIME + 2
    assert f"step {len(left.trunk.seen)}: " in str(left.suspected)
    assert "alignment" in str(left.suspected)
    assert all(parameter.grad is None for parameter in left.client.head.parameters()), "nothing of it was used"


def test_a_careless_hijacker_is_stopped_at_the_first_step(tmp_path: Path) -> None:
    run = watched(settings("lora", head_blocks=1, rate=1e-3, steps=3))
    left = duel(run, tmp_path, hijacker(run), careful=False)
    assert "no label can reach" in str(left.suspected)
    assert len(left.trunk.seen) == 1


def test_a_warning_comes_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = watched(settings("lora", head_blocks=1, rate=1e-3, steps=6), "warn")
    with caplog.at_level(logging.WARNING, logger="hpc"):
        left = duel(run, tmp_path, hijacker(run))
    assert left.suspected is None
    assert len(left.trunk.seen) == 6
    assert left.client.side.detector.noticed in range(IN_TIME - 1, IN_TIME + 2)
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


def test_what_a_third_thing_explains_of_both_is_taken_out() -> None:
    draw = torch.Generator().manual_seed(0)
    known, own = (torch.randn(40, 16, generator=draw) for _ in range(2))
    both, other = known + 0.2 * own, known @ torch.randn(16, 16, generator=draw)
    plain = alignment(both, other)
    assert plain is not None
    assert plain > 0.5
    assert beyond(both, other, known) < 0.2
    assert beyond(own, 2 * own, known) == pytest.approx(1.0)


def test_what_lies_behind_a_rows_end_is_stray() -> None:
    returned = torch.ones(2, 3, 4)
    assert stray_share(returned, [3, 3]) == 0.0
    assert stray_share(returned, [3, 0]) == pytest.approx(0.5**0.5)
    assert stray_share(torch.zeros(2, 3, 4), [0, 0]) == 0.0


def test_with_frozen_heads_there_is_nothing_to_watch_and_it_says_so() -> None:
    with pytest.raises(ConfigError, match="detector"):
        replace(config(), adapter=AdapterConfig(parts=["tail"]), privacy=PrivacyConfig(detector="warn"))


def test_a_finite_answer_to_a_gradient_that_is_not_is_suspicious() -> None:
    """A server may choose the loss scale so that a client's gradient overflows, to return what it likes unseen."""
    sent_BTD, smashed_BTD = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    sent_BTD[1, 0, 2] = torch.inf
    honest_BTD = torch.randn(2, 3, 4)
    honest_BTD[1] = torch.nan
    for returned_BTD, noticed in ((honest_BTD, None), (torch.zeros(2, 3, 4), None), (torch.randn(2, 3, 4), 5)):
        detector = Detector("warn")
        detector.sent(0, sent_BTD)
        detector.returned(5, 0, returned_BTD, (3, 3), smashed_BTD)
        assert detector.noticed == noticed
