"""What happened beside plain steps, in the summary and in the notes below the tables."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpc.report import events as e
from hpc.report.summary import summarise
from hpc.report.table import print_summary
from tests.unit import report_case as case


@pytest.fixture
def events(tmp_path: Path) -> dict[str, list[e.Event]]:
    case.write_run(tmp_path)
    return case.read_run(tmp_path)


def note(name: str, **fields: Any) -> e.Event:
    return {"event": name, "time": 0.0, **fields}


def printed(summary: dict[str, Any]) -> str:
    text = io.StringIO()
    print_summary(summary, console=Console(file=text, width=120, highlight=False))
    return text.getvalue()


def test_a_run_without_incidents_says_so(events: dict[str, list[e.Event]]) -> None:
    summary = summarise(case.config(), events)
    assert (summary["skipped_steps"], summary["nonfinite"], summary["lost_clients"]) == (0, [], [])
    assert summary["failed_checkpoints"] == []
    assert (summary["stopped_early_at"], summary["averages"]) == (None, {"count": 0, "seconds": None})
    assert not any(word in printed(summary) for word in ("Left out", "Lost", "Stopped", "averaged", "cache", "saved"))


def test_a_skipped_step_counts_once_however_many_say_so(events: dict[str, list[e.Event]]) -> None:
    said = [
        note("nonfinite", step=3, client_id=1, what="loss"),
        note("nonfinite", step=2, client_id=-1, what="gradient"),
    ]
    events["trunk-0"] += said
    events["trunk-1"] = list(said)
    for event in events["trunk-0"]:
        if event["event"] == "step":
            event["skipped"] = event["step"] in (1, 3)  # 1: by the loss scale, without a note
    events["baseline"][3]["skipped"] = True
    summary = summarise(case.config(), events)
    assert summary["skipped_steps"] == 3
    assert summary["nonfinite"] == [
        {"step": 2, "client_id": None, "what": "gradient"},
        {"step": 3, "client_id": 1, "what": "loss"},
    ]
    assert "Left out, as not finite: 3 steps (gradient in step 2; client-1 loss in step 3)" in printed(summary)


def test_lost_clients_are_named_with_the_reason(events: dict[str, list[e.Event]]) -> None:
    events["trunk-0"].append(note("client_lost", step=3, client_id=1, why="silent for 60 s"))
    summary = summarise(case.config(), events)
    assert summary["lost_clients"] == [{"step": 3, "client_id": 1, "why": "silent for 60 s"}]
    assert "Lost: 1 client (client-1 in step 3: silent for 60 s)" in printed(summary)


def test_checkpoints_that_failed_are_counted_once_each(events: dict[str, list[e.Event]]) -> None:
    events["trunk-0"] += [note("checkpoint_failed", step=step, why="client-1 could not write") for step in (2, 4)]
    events["client-1"].append(note("checkpoint_failed", step=4, why="No space left on device"))
    summary = summarise(case.config(), events)
    assert summary["failed_checkpoints"] == [
        {"step": 2, "why": "client-1 could not write"},
        {"step": 4, "why": "client-1 could not write; No space left on device"},
    ]
    assert "Not saved: 2 checkpoints (step 2: client-1 could not write; step 4: " in printed(summary).replace("\n", " ")


def test_an_average_takes_as_long_as_its_slowest_rank(events: dict[str, list[e.Event]]) -> None:
    events["trunk-0"] += [note("average", step=2, seconds=1.0), note("average", step=4, seconds=2.0)]
    events["trunk-1"] = [note("average", step=2, seconds=5.0)]
    summary = summarise(case.config(), events)
    assert summary["averages"] == {"count": 2, "seconds": 3.5}
    assert "averaged 2 times, 3.500 s each" in printed(summary)


def test_an_early_stop_is_told(events: dict[str, list[e.Event]]) -> None:
    events["trunk-0"].append(note("early_stop", step=4))
    summary = summarise(case.config(max_steps=100), events)
    assert summary["stopped_early_at"] == 4
    assert "Stopped early after step 4" in printed(summary)


def test_turns_are_ignored(events: dict[str, list[e.Event]]) -> None:
    plain = summarise(case.config(), events)
    events["trunk-0"].append(note("turn", number=1, seconds=2.0))
    assert summarise(case.config(), events) == plain


def test_a_run_that_went_wrong_at_every_step_does_not_fill_the_screen(events: dict[str, list[e.Event]]) -> None:
    events["trunk-0"] += [note("nonfinite", step=step, client_id=0, what="loss") for step in range(1, 101)]
    summary = summarise(case.config(), events)
    assert len(summary["nonfinite"]) == summary["skipped_steps"] == 100
    text = printed(summary)
    assert "client-0 loss in step 5; and 95 more)" in text.replace("\n", " ")
    assert "step 6" not in text
