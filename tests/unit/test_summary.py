"""The summary against figures worked out by hand (report_case.py)."""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path

import pytest

from hpc.config import Config
from hpc.report import events as e
from hpc.report.finish import finish
from hpc.report.provenance import git_commit, machine, peak_rss_mib, versions
from hpc.report.summary import summarise, write_json_atomic
from tests.unit import report_case as case

PROMISED = (
    *("schedule", "clients", "trunk_ranks", "steps", "seed", "model", "adapter", "transport", "encryption"),
    *("loss_first", "loss_last", "losses", "eval", "step_seconds", "tokens_per_second", "link_bytes_per_step"),
    *("seconds_per_step", "peak_rss_mib", "parameters", "versions", "git_commit"),
    *("losses_by_client", "trunk_idle_share", "link_bytes_first_step", "link_bytes_last_step"),
    *("skipped_steps", "nonfinite", "lost_clients", "stopped_early_at", "averages"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    case.write_run(tmp_path)
    return tmp_path


def test_losses_are_weighted_by_label_tokens(folder: Path) -> None:
    summary = summarise(case.config(), case.read_run(folder))
    assert summary["losses"] == [1.0, 0.8, 0.5, 0.25]
    assert (summary["loss_first"], summary["loss_last"], summary["steps"]) == (1.0, 0.25, 4)


def test_time_figures_leave_out_two_steps_of_warm_up(folder: Path) -> None:
    summary = summarise(case.config(), case.read_run(folder))
    assert summary["step_seconds"] == {"median": 2.5, "p90": 3.0}
    assert summary["tokens_per_second"] == 2 * 2 * 50 / (2.0 + 3.0)
    expected = {"head": 1.0, "tail": 0.25, "trunk": 1.0, "seal": 0.2, "open": 0.3, "wire": 0.3, "wait": 0.4}
    assert summary["seconds_per_step"] == pytest.approx(expected)


def test_a_trunk_ranks_idle_share_is_of_its_steady_steps(folder: Path) -> None:
    events = case.read_run(folder)
    summary = summarise(case.config(), events)
    assert summary["trunk_idle_share"] == pytest.approx(0.8 / 5.0)
    steps = [event for event in events["trunk-0"] if event["event"] == "step"]
    # Another rank that waits for all of a step, in the warm-up too, which must not count twice.
    events["trunk-1"] = [{**event, "seconds": {"wait": 2.0, "total": 4.0}} for event in steps]
    summary = summarise(case.config(), events)
    assert summary["trunk_idle_share_by_rank"] == pytest.approx({"trunk-0": 0.16, "trunk-1": 0.5})
    assert summary["trunk_idle_share"] == pytest.approx(0.33)


def test_bytes_are_per_step_over_all_links(folder: Path) -> None:
    summary = summarise(case.config(), case.read_run(folder))
    assert summary["link_bytes_per_step"] == {"payload": 2500.0, "wire": 2750.0, "cached": None}
    assert (summary["link_bytes_first_step"], summary["link_bytes_last_step"]) == (1000, 4000)


def test_cached_bytes_and_the_last_step_show_what_a_cache_spares() -> None:
    def rank(*payload_and_cached: tuple[int, int]) -> list[e.Event]:
        return [
            {
                "event": "step",
                "step": step,
                "seconds": {"total": 1.0},
                "bytes": {"payload": payload, "wire": payload, "cached": cached},
            }
            for step, (payload, cached) in enumerate(payload_and_cached, start=1)
        ]

    events = {"trunk-0": rank((100, 0), (40, 60)), "trunk-1": rank((10, 0), (4, 6))}
    summary = summarise(case.config(), events)
    assert summary["link_bytes_per_step"] == {"payload": 77.0, "wire": 77.0, "cached": 33.0}
    assert (summary["link_bytes_first_step"], summary["link_bytes_last_step"]) == (110, 44)


def test_each_clients_losses_are_those_of_the_steps_it_took_part_in(folder: Path) -> None:
    events = case.read_run(folder)
    sat_out = {"event": "step", "step": 3}
    events["client-1"] = [event for event in events["client-1"] if not sat_out.items() <= event.items()]
    summary = summarise(case.config(), events)
    assert summary["losses_by_client"] == {
        "client-0": [[1, 1.0], [2, 0.5], [3, 0.75], [4, 0.5]],
        "client-1": [[1, 1.0], [2, 1.0], [4, 1 / 6]],
    }
    assert summary["losses"] == [1.0, 0.8, 0.75, 0.25]
    del events["client-1"]
    assert list(summarise(case.config(), events)["losses_by_client"]) == ["client-0"]


def test_a_step_that_nobody_told_of_keeps_its_place_among_the_losses(folder: Path) -> None:
    events = {
        role: [event for event in found if event.get("step") != 2 or event["event"] != "step"]
        for role, found in case.read_run(folder).items()
    }
    assert summarise(case.config(), events)["losses"] == [1.0, None, 0.5, 0.25]


def test_a_last_step_without_a_loss_leaves_the_newest_known_one(folder: Path) -> None:
    events = case.read_run(folder)
    for client in ("client-0", "client-1"):
        events[client] = [event for event in events[client] if event.get("step") != case.STEPS]
    summary = summarise(case.config(), events)
    assert (summary["losses"][-1], summary["loss_last"]) == (None, 0.5)


def test_baseline_is_compared_over_the_same_steps(folder: Path) -> None:
    found = summarise(case.config(), case.read_run(folder))["baseline"]
    assert found["steps"] == 4
    assert (found["split_step_seconds"], found["step_seconds"], found["ratio"]) == (2.5, 1.25, 2.0)
    assert found["loss_max_abs_difference"] == pytest.approx(0.01)


def test_roles_say_what_they_held(folder: Path) -> None:
    summary = summarise(case.config(), case.read_run(folder))
    assert summary["peak_rss_mib"] == {"trunk-0": 300.0, "client-0": 100.0, "client-1": 101.0}
    assert summary["parameters"]["trunk"] == {"owned": 1000, "trainable": 10}
    assert summary["parameters"]["tail"] == {"owned": 300, "trainable": 3}
    assert (summary["transport"], summary["versions"]) == ("gloo", {"torch": "2"})


def test_a_client_whose_file_is_elsewhere_leaves_the_losses_unknown(folder: Path) -> None:
    events = case.read_run(folder)
    del events["client-1"]
    summary = summarise(case.config(), events)
    assert summary["losses"] == [None] * 4
    assert summary["loss_first"] is summary["loss_last"] is summary["eval"]["accuracy"] is None
    assert summary["baseline"]["loss_max_abs_difference"] is None
    assert summary["eval"]["per_client"]["client-0"]["accuracy"] == 1.0


def test_serial_steps_have_one_client_each() -> None:
    def step(number: int, loss: float) -> e.Event:
        return {
            "event": "step",
            "step": number,
            "loss_sum": loss,
            "label_tokens": 2,
            "tokens": 5,
            "seconds": {"total": 1.0},
        }

    events = {"client-0": [step(1, 4.0)], "client-1": [step(2, 3.0)]}
    assert summarise(case.config(schedule="serial"), events)["losses"] == [2.0, 1.5]


def test_centralised_has_one_role_that_tells_everything() -> None:
    step = {"event": "step", "step": 1, "loss_sum": 3.0, "label_tokens": 2, "tokens": 8, "seconds": {"total": 2.0}}
    evals = [{"event": "eval", "step": 0, "correct": k, "total": 2, "client_id": k} for k in (0, 1)]
    summary = summarise(case.config(schedule="centralised"), {"centralised": [*evals, step]})
    assert (summary["losses"], summary["tokens_per_second"], summary["transport"]) == ([1.5], 4.0, "none")
    assert summary["eval"]["per_client"]["client-1"]["accuracy"] == 0.5
    assert summary["link_bytes_per_step"] == {"payload": None, "wire": None, "cached": None}
    assert summary["link_bytes_first_step"] is summary["trunk_idle_share"] is None
    assert summary["losses_by_client"] == summary["trunk_idle_share_by_rank"] == {}


def test_no_events_at_all_still_give_every_promised_key() -> None:
    summary = summarise(case.config(), {})
    assert [key for key in PROMISED if key not in summary] == []
    assert summary["losses"] == []


def test_a_loss_that_is_not_finite_stays_visible(tmp_path: Path) -> None:
    events = case.read_run(tmp_path) or {
        "centralised": [
            {
                "event": "step",
                "step": 1,
                "loss_sum": math.inf,
                "label_tokens": 1,
                "tokens": 1,
                "seconds": {"total": 1.0},
            }
        ]
    }
    summary = summarise(case.config(schedule="centralised"), events)
    write_json_atomic(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text())["losses"] == ["inf"]


def test_a_run_without_a_name_is_called_after_its_folder(folder: Path) -> None:
    unnamed = Config(train=case.config().train)
    assert finish(unnamed, folder)["name"] == folder.name
    assert summarise(case.config(), {})["name"] == "case"


def test_finish_writes_what_a_run_promises(folder: Path) -> None:
    summary = finish(case.config(folder), folder)
    assert {path.name for path in folder.iterdir()} == {
        "roles", "metrics.jsonl", "summary.json", "loss.png", "clients.png", "time.png", "tb",
    }  # fmt: skip
    assert json.loads((folder / "summary.json").read_text())["losses"] == summary["losses"]
    merged = e.read_events(folder / "metrics.jsonl")
    places = [(event.get("step", math.inf), e.role_order(event["role"])) for event in merged]
    assert places == sorted(places)
    assert len(list((folder / "tb").iterdir())) == 1
    finish(case.config(folder), folder)
    assert len(list((folder / "tb").iterdir())) == 1


def test_finish_waits_a_little_for_a_role_that_has_not_ended(folder: Path) -> None:
    log = e.EventLog(e.role_path(folder, "client-1"))
    log.write(e.Started(step=case.STEPS))
    late = threading.Timer(0.3, lambda: log.write(e.Ended(peak_rss_mib=7.0, parameters={}, keys_read=0)))
    late.start()
    assert finish(case.config(folder), folder)["peak_rss_mib"]["client-1"] == 7.0
    late.join()
    log.write(e.Started(step=case.STEPS))
    assert "client-1" not in finish(case.config(folder), folder, wait_s=0.2)["peak_rss_mib"]
    log.close()


def test_finish_does_not_wait_for_a_client_that_was_lost(folder: Path) -> None:
    with e.EventLog(e.role_path(folder, "client-1")) as log:
        log.write(e.Started(step=case.STEPS))
    with e.EventLog(e.role_path(folder, "trunk-0")) as log:
        log.note("client_lost", step=4, client_id=1, why="silent")
    begin = time.monotonic()
    finish(case.config(folder), folder, wait_s=60)
    assert time.monotonic() - begin < 30


def test_finish_waits_for_a_client_that_came_back_with_a_restart(folder: Path) -> None:
    with e.EventLog(e.role_path(folder, "trunk-0")) as log:
        log.note("client_lost", step=4, client_id=1, why="silent")
        log.write(e.Started(step=case.STEPS))
        log.write(e.Ended(peak_rss_mib=1.0, parameters={}, keys_read=0))
    client = e.EventLog(e.role_path(folder, "client-1"))
    client.write(e.Started(step=case.STEPS))
    late = threading.Timer(0.3, lambda: client.write(e.Ended(peak_rss_mib=7.0, parameters={}, keys_read=0)))
    late.start()
    assert finish(case.config(folder), folder)["peak_rss_mib"]["client-1"] == 7.0
    late.join()
    client.close()


def test_provenance_names_versions_machine_and_memory() -> None:
    assert versions()["torch"] is not None
    assert machine()["cores"] >= 1
    assert 1 < peak_rss_mib() < 1e6
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+dirty")) == 40
