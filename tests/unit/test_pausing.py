"""Asked to stop, a run ends at the next step's boundary with a checkpoint, and goes on from it as if it never had."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.centralised import Centralised
from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig, TrunkConfig
from hpc.errors import Paused
from hpc.link.identity import ensure_local
from hpc.resume import committed_steps
from hpc.stopping import StopRequest
from tests.loopback import Outcome, run_centralised, run_split
from tests.unit.test_lost_clients import peers_in

STEPS = 6


def tiny(cache_mib: float = 0, parts: Any = ("head", "trunk", "tail"), **train: Any) -> Config:
    values = {"max_steps": STEPS, "per_client_batch_size": 3, "weight_decay": 0.1, "lr_scheduler": "constant", **train}
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4, parts=list(parts)),
        data=DataConfig(train_examples=10, val_examples=4),
        train=TrainConfig(**values),
        trunk=TrunkConfig(smashed_cache_mib=cache_mib),
    )


def at_boundary(number: int) -> Callable[[], bool]:
    """Asked to stop at the boundary with this number, counted from 0."""
    count = itertools.count()
    return lambda: next(count) == number


def forget_events(folder: Path) -> None:
    for path in folder.glob("roles/*/metrics.jsonl"):
        path.unlink()


def equal(resumed: Outcome, whole: Outcome, start: int) -> None:
    assert resumed.losses == whole.losses[start:]
    for name, tensor in whole.trained.items():
        assert torch.equal(tensor, resumed.trained[name]), name
    for one, other in zip(whole.clients, resumed.clients, strict=True):
        for name, tensor in one.learner.parameters.items():
            assert torch.equal(tensor, other.learner.parameters[name]), name


@pytest.mark.parametrize(
    "config",
    [
        tiny(eval_every=2),
        tiny(save_every=2, eval_every=2),  # paused where a checkpoint has just been written
        tiny(schedule="pipelined", micro_batches=2),
        tiny(schedule="pipelined", micro_batches=3, min_clients=1),
        tiny(schedule="replica", sync_every=3, clients=3, clients_per_round=2),
        tiny(aggregation="none", clients=3, clients_per_round=1, sync_every=2),  # some clients run ahead
        tiny(schedule="serial", sync_every=2, eval_every=2),
        tiny(schedule="serial", aggregation="none", sync_every=2, clients=3),
    ],
    ids=lambda config: f"{config.train.schedule}-{config.train.resolved_aggregation}",
)
def test_paused_and_resumed_equals_uninterrupted(config: Config, tmp_path: Path, keys: Path) -> None:
    step = 2 if config.train.save_every else 3

    def peers() -> Any:
        return peers_in(keys) if config.train.clients_meet else None

    whole = run_split(config, tmp_path / "whole", peers=peers())
    folder = tmp_path / "paused"
    with pytest.raises(Paused, match=f"paused after step {step}, with a checkpoint"):
        run_split(config, folder, stop_asked=at_boundary(step), peers=peers())
    assert committed_steps(folder)[-1] == step
    forget_events(folder)
    equal(run_split(config, folder, start=step, peers=peers()), whole, step)


def test_a_resumed_cache_begins_empty_on_both_ends(tmp_path: Path) -> None:
    """What is sent again comes in other batches, so equality is up to rounding."""
    config = tiny(cache_mib=1, parts=("trunk", "tail"))
    whole = run_split(config, tmp_path / "whole")
    with pytest.raises(Paused):
        run_split(config, tmp_path / "paused", stop_asked=at_boundary(3))
    forget_events(tmp_path / "paused")
    assert run_split(config, tmp_path / "paused", start=3).losses == pytest.approx(whole.losses[3:], rel=1e-6)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities")
    ensure_local(folder, 3)
    return folder


def test_before_the_first_step_there_is_nothing_to_save(tmp_path: Path) -> None:
    with pytest.raises(Paused, match="before the first step"):
        run_split(tiny(), tmp_path, stop_asked=at_boundary(0))
    assert committed_steps(tmp_path) == []


def test_the_baseline_pauses_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(schedule="centralised", eval_every=2)
    whole = run_centralised(config, tmp_path / "whole")
    run = Centralised.run
    with monkeypatch.context() as patch:
        asked = at_boundary(2)
        patch.setattr(Centralised, "run", lambda self, *a, **k: run(self, *a, **k, stop_asked=asked))
        with pytest.raises(Paused, match="paused after step 2"):
            run_centralised(config, tmp_path / "paused")
    forget_events(tmp_path / "paused")
    equal(run_centralised(config, tmp_path / "paused", start=2), whole, 2)


def test_early_stopping_counts_no_evaluation_twice(tmp_path: Path) -> None:
    """The pause comes before the evaluation at its step, so that the resumed run makes it, once."""
    config = tiny(eval_every=1, early_stopping_patience=2, learning_rate=0.05, max_steps=30)
    whole = run_split(config, tmp_path / "whole")
    assert 3 < len(whole.losses) < 30
    with pytest.raises(Paused):
        run_split(config, tmp_path / "paused", stop_asked=at_boundary(3))
    forget_events(tmp_path / "paused")
    assert run_split(config, tmp_path / "paused", start=3).losses == whole.losses[3:]


# --- signals


def test_the_first_signal_asks_and_the_second_ends() -> None:
    request = StopRequest(again_s=-1)
    request.begin()
    assert not request()
    request.ask(signal.SIGTERM)
    assert request()
    request.ask(signal.SIGTERM)
    assert request.wait_for_end(60) == ("ended by SIGTERM: asked again", 128 + signal.SIGTERM)


def test_the_same_request_may_come_by_two_ways() -> None:
    """Whoever signals all processes of a job reaches the launcher, which passes it on."""
    request = StopRequest()
    request.begin()
    request.ask(signal.SIGTERM)
    request.ask(signal.SIGUSR1)
    assert "no checkpoint within" in request.wait_for_end(0.05)[0]


def test_who_does_not_get_there_in_time_ends() -> None:
    request = StopRequest()
    request.begin()
    request.ask(signal.SIGUSR1)
    why, code = request.wait_for_end(0.05)
    assert "no checkpoint within --run.grace_s 0.05 s" in why
    assert code == 128 + signal.SIGUSR1


def test_who_has_not_begun_ends_at_once() -> None:
    request = StopRequest()
    request.ask(signal.SIGTERM)
    why, code = request.wait_for_end(60)
    assert "before the run began" in why
    assert code == Paused.exit_code


BUSY = """
import ctypes, os
from hpc.stopping import listen
request = listen(grace_s=0.3, end=lambda why, code: (print(why, flush=True), os._exit(code)))
request.begin()
print("ready", flush=True)
while True:  # a library's wait, begun anew whenever a signal ends it; no Python code in between
    ctypes.CDLL(None).sleep(30)
"""


def test_a_signal_is_heard_while_the_main_thread_is_in_a_librarys_wait() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert "no checkpoint within" in process.stdout.readline()
        assert process.wait(10) == 128 + signal.SIGTERM
    assert time.monotonic() - start < 5
