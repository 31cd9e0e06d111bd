"""A small run, two clients and four steps, whose figures can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc.config import Config, RunConfig, TrainConfig
from hpc.report import events as e

STEPS = 4
# Loss sums and label tokens of the two clients; means over both: 1.0, 0.8, 0.5, 0.25.
LOSSES = {1: ((2.0, 2), (6.0, 6)), 2: ((1.0, 2), (3.0, 3)), 3: ((1.5, 2), (0.5, 2)), 4: ((0.5, 1), (0.5, 3))}
# Held-out loss sums and label tokens of the two clients, before and after; means over both: 4/3 and 1/3.
HELD_OUT = {0: ((8.0, 4), (8.0, 8)), STEPS: ((2.0, 4), (2.0, 8))}
TRUNK_TOTALS = {1: 9.0, 2: 5.0, 3: 2.0, 4: 3.0}
BASELINE_TOTALS = {1: 8.0, 2: 4.0, 3: 1.0, 4: 1.5}


def config(folder: Path | None = None, **train: Any) -> Config:
    run = RunConfig(name="case", output_dir=str(folder) if folder else None)
    return Config(train=TrainConfig(**{"clients": 2, "max_steps": STEPS, **train}), run=run)


def write_run(folder: Path, *, baseline: bool = True) -> None:
    """Every role's file, in the way the roles write them."""
    _write_trunk(folder)
    for client in range(2):
        _write_client(folder, client)
    if baseline:
        _write_baseline(folder)


def read_run(folder: Path) -> dict[str, list[e.Event]]:
    return {role: e.read_events(path) for role, path in e.role_files(folder).items()}


def _write_trunk(folder: Path) -> None:
    with e.EventLog(e.role_path(folder, "trunk-0")) as log:
        log.write(e.Started())
        for step in range(1, STEPS + 1):
            seconds = {"trunk": 1.0, "seal": 0.1, "open": 0.2, "wire": 0.3, "wait": 0.4, "total": TRUNK_TOTALS[step]}
            sent = {"payload": 1000 * step, "wire": 1100 * step}
            log.write(e.TrunkStep(step=step, seconds=seconds, bytes=sent, learning_rate=0.1, grad_norm=2.0))
        held = {"trunk": {"owned": 1000, "trainable": 10}}
        log.write(e.Ended(peak_rss_mib=300.0, parameters=held, keys_read=9, versions={"torch": "2"}, transport="gloo"))


def _write_client(folder: Path, client: int) -> None:
    with e.EventLog(e.role_path(folder, f"client-{client}")) as log:
        log.write(e.Started())
        log.write(_evaluation(0, client, correct=2 + client))
        for step in range(1, STEPS + 1):
            loss_sum, label_tokens = LOSSES[step][client]
            seconds = {
                "head": 0.5 + client,
                "tail": 0.25,
                "seal": 0.1,
                "open": 0.1,
                "wire": 0.3,
                "wait": 1.0,
                "total": 3.0,
            }
            log.write(e.ClientStep(step=step, loss_sum=loss_sum, label_tokens=label_tokens, tokens=50, seconds=seconds))
        log.write(_evaluation(STEPS, client, correct=4 + client))
        held = {"head": {"owned": 200, "trainable": 2}, "tail": {"owned": 300, "trainable": 3}}
        log.write(e.Ended(peak_rss_mib=100.0 + client, parameters=held, keys_read=3))


def _evaluation(step: int, client: int, correct: int) -> e.Evaluation:
    loss_sum, tokens = HELD_OUT[step][client]
    return e.Evaluation(step=step, correct=correct, total=4 * (client + 1), loss_sum=loss_sum, label_tokens=tokens)


def _write_baseline(folder: Path) -> None:
    with e.EventLog(e.role_path(folder, "baseline")) as log:
        for step in range(1, STEPS + 1):
            loss_sum, tokens = (sum(values) for values in zip(*LOSSES[step], strict=True))
            shifted = loss_sum + (0.05 if step == 2 else 0.0)
            total = {"total": BASELINE_TOTALS[step]}
            log.write(e.WholeStep(step=step, loss_sum=shifted, label_tokens=int(tokens), tokens=100, seconds=total))
