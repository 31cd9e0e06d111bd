"""The event files: exact, crash-proof, and right after a resume."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hpc.report import events as e


def client_step(step: int, loss_sum: float = 1.0) -> e.ClientStep:
    return e.ClientStep(step=step, loss_sum=loss_sum, label_tokens=4, tokens=9, seconds={"total": 0.5})


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    path = e.role_path(tmp_path, "client-1")
    with e.EventLog(path) as log:
        log.write(client_step(1, loss_sum=0.1 + 0.2))
        log.note("peer_lost", step=1, client_id=1)
    first, second = e.read_events(path)
    assert (first["event"], first["role"], first["loss_sum"]) == ("step", "client-1", 0.1 + 0.2)
    assert first["seconds"] == {"total": 0.5}
    assert (second["event"], second["client_id"]) == ("peer_lost", 1)


def test_each_event_is_on_disc_before_the_next(tmp_path: Path) -> None:
    log = e.EventLog(tmp_path / "trunk-0" / e.FILE_NAME)
    log.write(e.Started())
    assert len(e.read_events(log.path)) == 1
    log.close()


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "r" / e.FILE_NAME
    with e.EventLog(path) as log:
        log.write(client_step(1, loss_sum=math.nan))
        log.write(client_step(2, loss_sum=-math.inf))
    assert [json.loads(line)["loss_sum"] for line in path.read_text().splitlines()] == ["nan", "-inf"]
    nan, infinite = (event["loss_sum"] for event in e.read_events(path))
    assert math.isnan(nan)
    assert infinite == -math.inf


def test_a_cut_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "r" / e.FILE_NAME
    with e.EventLog(path) as log:
        log.write(client_step(1))
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in e.read_events(path)] == [1]
    with e.EventLog(path) as log:
        log.write(client_step(2))
    assert [event["step"] for event in e.read_events(path)] == [1, 2]


def test_tail_gives_each_whole_event_once(tmp_path: Path) -> None:
    path = tmp_path / "r" / e.FILE_NAME
    tail = e.Tail(path)
    assert tail() == []
    with e.EventLog(path) as log:
        log.write(client_step(1))
        assert [event["step"] for event in tail()] == [1]
        assert tail() == []
        with path.open("a") as file:
            file.write('{"event": "step", ')
        assert tail() == []
        with path.open("a") as file:
            file.write('"step": 2}\n')
        assert [event["step"] for event in tail()] == [2]


def test_a_resumed_run_supersedes_what_lies_beyond_its_checkpoint() -> None:
    def named(name: str, step: int, mark: str) -> e.Event:
        return {"event": name, "step": step, "mark": mark}

    first = [named("started", 0, "a"), *(named("step", s, "a") for s in (1, 2, 3)), {"event": "summary", "mark": "a"}]
    second = [named("started", 2, "b"), named("step", 3, "b")]
    kept = [(event["event"], event.get("step"), event["mark"]) for event in e.current_attempt(first + second)]
    assert kept == [("started", 0, "a"), ("step", 1, "a"), ("step", 2, "a"), ("started", 2, "b"), ("step", 3, "b")]


def test_a_restart_forgets_the_notes_beyond_its_checkpoint_and_any_early_stop() -> None:
    kept_notes = [
        {"event": "nonfinite", "step": 2, "client_id": 0, "what": "loss"},
        {"event": "nonfinite", "step": 2, "client_id": 1, "what": "loss"},
        {"event": "average", "step": 4, "seconds": 1.0},
        {"event": "client_lost", "step": 4, "client_id": 1, "why": "silent"},
    ]
    gone = [
        {"event": "early_stop", "step": 4},
        {"event": "nonfinite", "step": 5, "client_id": 0, "what": "loss"},
        {"event": "average", "step": 6, "seconds": 1.0},
        {"event": "client_lost", "step": 5, "client_id": 0, "why": "silent"},
        {"event": "turn", "number": 1, "seconds": 1.0},
    ]
    again: e.Event = {"event": "started", "step": 4}
    stop: e.Event = {"event": "early_stop", "step": 6}
    assert e.current_attempt([*kept_notes, *gone, again, stop]) == [*kept_notes, again, stop]


def test_a_fresh_start_in_a_used_folder_forgets_everything() -> None:
    used = [{"event": "eval", "step": 0}, {"event": "step", "step": 1}]
    assert e.current_attempt([*used, {"event": "started", "step": 0}]) == [{"event": "started", "step": 0}]


def test_evaluations_of_different_clients_at_one_step_all_count() -> None:
    both = [{"event": "eval", "step": 0, "client_id": k} for k in (0, 1)]
    assert e.current_attempt(both) == both


def test_roles_come_trunk_first_and_by_number(tmp_path: Path) -> None:
    for role in ("baseline", "client-10", "client-9", "trunk-0"):
        e.EventLog(e.role_path(tmp_path, role)).write(e.Started())
    assert list(e.role_files(tmp_path)) == ["trunk-0", "client-9", "client-10", "baseline"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disc_costs_events_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "trunk-0" / e.FILE_NAME
    with e.EventLog(path) as log:
        log.note("before")
        log._file = Path("/dev/full").open("a")  # noqa: SIM115  # the log closes it
        log.note("lost")
        log.note("after")
    assert [event["event"] for event in e.read_events(path)] == ["before", "after"]
    assert caplog.text.count("events of trunk-0 are lost") == 1
