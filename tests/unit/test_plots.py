"""The plots exist, are not blank, and cope with what a run may leave out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpc.report.plots import bar_parts, moving_average, plot_all, plot_loss
from hpc.report.summary import summarise
from hpc.report.tensorboard import scalars
from tests.unit import report_case as case


@pytest.fixture
def summary(tmp_path: Path) -> dict[str, Any]:
    case.write_run(tmp_path)
    return summarise(case.config(), case.read_run(tmp_path))


def test_all_plots_are_drawn(summary: dict[str, Any], tmp_path: Path) -> None:
    drawn = plot_all(summary, tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "clients.png", "time.png"]
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_a_run_without_evaluation_or_with_one_nan_is_drawn(summary: dict[str, Any], tmp_path: Path) -> None:
    bare = {**summary, "eval": {**summary["eval"], "history": []}, "baseline": None}
    bare["losses"] = [float("nan"), None, 1.0, 2.0]
    assert len(plot_all(bare, tmp_path)) == 3


@pytest.mark.parametrize(
    ("history", "shown"),
    [
        ([[0, 2.0], [4, 1.0]], [[0, 4], [2.0, 1.0]]),
        ([[0, math.nan], [2, 2.0], [4, 1.0]], [[2, 4], [2.0, 1.0]]),
        ([[0, 2.0]], None),
        ([], None),
    ],
)
def test_held_out_losses_are_points_beside_the_training_loss(
    summary: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    history: list[list[float]],
    shown: list[list[float]] | None,
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr("hpc.report.plots.save", lambda figure, path: kept.append(figure) or path)
    plot_loss({**summary, "eval": {**summary["eval"], "loss_history": history}}, tmp_path / "loss.png")
    found = [line for line in kept[0].axes[0].lines if line.get_label() == "held out"]
    assert [[list(line.get_xdata()), list(line.get_ydata())] for line in found] == ([] if shown is None else [shown])


def test_nothing_known_draws_nothing(tmp_path: Path) -> None:
    assert plot_all(summarise(case.config(), {}), tmp_path) == []


def test_moving_average_begins_with_what_there_is() -> None:
    assert moving_average([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_bar_parts_add_up_to_the_step() -> None:
    assert bar_parts({"head": 1.0, "wait": 2.0, "total": 3.5}) == {"head": 1.0, "wait": 2.0, "other": 0.5}
    assert bar_parts({"total": 3.5}) == {"whole step": 3.5}


def test_scalars_hold_the_loss_and_each_role(summary: dict[str, Any], tmp_path: Path) -> None:
    found = {(tag, step): value for tag, value, step, _ in scalars(summary, case.read_run(tmp_path))}
    assert found["loss", 2] == 0.8
    assert found["accuracy", 4] == 0.75
    assert found["loss/client-0", 4] == 0.5
    assert found["accuracy/client-1", 0] == 3 / 8
    assert found["held_out_loss/client-1", 0] == 1.0
    assert found["held_out_loss", 4] == pytest.approx(1 / 3)
    assert found["link_wire_bytes/trunk-0", 1] == 1100


def test_scalars_of_files_without_held_out_loss_have_none(summary: dict[str, Any]) -> None:
    old = {"event": "eval", "step": 0, "time": 1.0, "correct": 1, "total": 2}
    bare = {**summary, "eval": {**summary["eval"], "loss_history": []}}
    assert [tag for tag, *_ in scalars(bare, {"client-0": [old]}) if "held_out" in tag] == []
