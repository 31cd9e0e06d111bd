"""Held-out figures against those worked out by hand (report_case.py)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from hpc.report import events as e
from hpc.report.summary import summarise
from tests.unit import report_case as case


def evaluation(step: int, right: int, total: int, loss_sum: float = math.nan, label_tokens: int = 0) -> e.Event:
    told = {"loss_sum": loss_sum, "label_tokens": label_tokens}
    return {"event": "eval", "step": step, "correct": right, "total": total, **told}


def figures(events: dict[str, list[e.Event]], **train: Any) -> dict[str, Any]:
    found: dict[str, Any] = summarise(case.config(**train), events)["eval"]
    return found


@pytest.fixture
def events(tmp_path: Path) -> dict[str, list[e.Event]]:
    case.write_run(tmp_path)
    return case.read_run(tmp_path)


def test_accuracy_before_and_after_for_each_client_and_all(events: dict[str, list[e.Event]]) -> None:
    found = figures(events)
    assert (found["accuracy_before"], found["accuracy"]) == (5 / 12, 9 / 12)
    own = found["per_client"]["client-1"]
    assert (own["accuracy_before"], own["accuracy"], own["history"]) == (3 / 8, 5 / 8, [[0, 3 / 8], [4, 5 / 8]])
    assert found["history"] == [[0, 5 / 12], [4, 9 / 12]]
    assert found["examples"] == 12


def test_held_out_loss_is_weighted_by_label_tokens(events: dict[str, list[e.Event]]) -> None:
    found = figures(events)
    assert (found["loss_before"], found["loss"]) == (16 / 12, 4 / 12)
    assert found["loss_history"] == [[0, 16 / 12], [4, 4 / 12]]
    own = found["per_client"]["client-1"]
    assert (own["loss_before"], own["loss"], own["loss_history"]) == (1.0, 0.25, [[0, 1.0], [4, 0.25]])


def test_the_mean_client_counts_every_client_alike(events: dict[str, list[e.Event]]) -> None:
    found = figures(events)
    assert (found["mean_client_accuracy_before"], found["mean_client_accuracy"]) == (7 / 16, 13 / 16)
    assert (found["mean_client_loss_before"], found["mean_client_loss"]) == (1.5, 0.375)


def test_old_files_without_a_loss_leave_it_unknown(events: dict[str, list[e.Event]]) -> None:
    for event in events["client-0"]:
        if event["event"] == "eval":
            del event["loss_sum"], event["label_tokens"]
    found = figures(events)
    assert (found["loss"], found["loss_history"], found["mean_client_loss"]) == (None, [], None)
    assert (found["accuracy"], found["per_client"]["client-1"]["loss"]) == (9 / 12, 0.25)


def test_a_client_without_held_out_examples_hides_nobody_elses() -> None:
    events = {"client-0": [evaluation(0, 1, 4, 2.0, 4)], "client-1": [evaluation(0, 0, 0)]}
    found = figures(events)
    assert (found["accuracy"], found["loss"]) == (0.25, 0.5)
    assert (found["mean_client_accuracy"], found["mean_client_loss"]) == (0.25, 0.5)


def test_a_loss_that_is_not_finite_stays_visible() -> None:
    events = {"client-0": [evaluation(0, 1, 2, math.inf, 2)], "client-1": [evaluation(0, 1, 2, 1.0, 2)]}
    assert figures(events)["loss"] == math.inf


def test_a_file_elsewhere_leaves_all_clients_unknown_but_not_the_others(events: dict[str, list[e.Event]]) -> None:
    del events["client-1"]
    found = figures(events)
    unknown = ("accuracy", "loss", "mean_client_accuracy", "mean_client_loss")
    assert [found[key] for key in unknown] == [None] * 4
    assert found["per_client"]["client-0"]["loss"] == 0.5


def test_steps_that_some_client_did_not_evaluate_do_not_count() -> None:
    events = {
        "client-0": [evaluation(0, 1, 4), evaluation(2, 2, 4), evaluation(4, 3, 4)],
        "client-1": [evaluation(0, 2, 4), evaluation(4, 4, 4)],
    }
    assert figures(events)["history"] == [[0, 3 / 8], [4, 7 / 8]]


def test_without_a_lost_clients_examples_before_and_after_stay_comparable() -> None:
    lost: e.Event = {"event": "client_lost", "step": 3, "client_id": 1, "why": "silent"}
    events = {
        "trunk-0": [lost],
        "client-0": [evaluation(0, 1, 4), evaluation(2, 2, 4), evaluation(4, 3, 4)],
        "client-1": [evaluation(0, 4, 4), evaluation(2, 4, 4)],
    }
    found = figures(events)
    assert (found["history"], found["examples"]) == ([[0, 1 / 4], [2, 2 / 4], [4, 3 / 4]], 4)
    assert found["per_client"]["client-1"]["history"] == [[0, 1.0], [2, 1.0]]
    # Lost, but back after a restart: it counts.
    events["client-1"].append(evaluation(4, 4, 4))
    assert figures(events)["history"] == [[0, 5 / 8], [2, 6 / 8], [4, 7 / 8]]


def test_centralised_tells_every_clients_held_out_loss() -> None:
    rows = [{**evaluation(0, 1, 2, float(k + 1), 2), "client_id": k} for k in (0, 1)]
    found = figures({"centralised": rows}, schedule="centralised")
    assert (found["loss"], found["per_client"]["client-1"]["loss"], found["mean_client_loss"]) == (0.75, 1.0, 0.75)


def test_what_was_scored_on_the_way_is_not_how_it_began() -> None:
    events = {"client-0": [{**evaluation(step, step, 8, 4.0, 8), "matched": 1} for step in (2, 4)]}
    found = figures(events, clients=1)
    assert (found["accuracy"], found["loss"], found["exact_match"]) == (0.5, 0.5, 1 / 8)
    assert found["accuracy_before"] is found["loss_before"] is found["mean_client_loss_before"] is None
    assert "exact_match_before" not in found
