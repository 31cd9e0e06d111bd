"""The end of a run: merge the roles' events, then write summary, plots and TensorBoard files."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.files import drafted
from hpc.report.events import FILE_NAME, Event, current_attempt, encode, read_events, role_files
from hpc.report.plots import plot_all
from hpc.report.provenance import git_commit, machine
from hpc.report.summary import summarise, write_json_atomic
from hpc.report.tensorboard import write_tensorboard

POLL_SECONDS = 0.1


def finish(config: Config, folder: str | Path, *, wait_s: float = 10.0) -> dict[str, Any]:
    """Report on the run in `folder` from whatever roles' files are there; returns the content of `summary.json`.

    Waits up to `wait_s` for roles that started to write their last word. May be called again, e.g. after a resumed
    run or once more files have been copied in: it writes everything anew.
    """
    folder = Path(folder)
    events = _read_ended(folder, time.monotonic() + wait_s)
    merge_events(events, folder / FILE_NAME)
    summary = summarise(config, events, name=folder.resolve().name, commit=git_commit(), machine=machine())
    # First the figures: if a plot fails (a full disc), they are safe.
    write_json_atomic(folder / "summary.json", summary)
    plot_all(summary, folder)
    if "tensorboard" in config.run.report_to:
        write_tensorboard(summary, events, folder)
    return summary


def _read_ended(folder: Path, deadline: float) -> dict[str, list[Event]]:
    """All roles' events; roles end at about the same time, so the reporting one may be some moments early."""
    while True:
        events = {role: read_events(path) for role, path in role_files(folder).items()}
        silent = {"baseline", *_lost(events)}
        if all(role in silent or _has_ended(found) for role, found in events.items()) or time.monotonic() > deadline:
            return events
        time.sleep(POLL_SECONDS)


def _has_ended(events: Sequence[Event]) -> bool:
    names = {event["event"] for event in current_attempt(events)}
    return "started" not in names or "summary" in names


def _lost(events: Mapping[str, Sequence[Event]]) -> set[str]:
    """Clients that were lost since their trunk rank began, for good, and so may have no last word."""
    lost: set[str] = set()
    for found in events.values():
        begins = [number for number, event in enumerate(found) if event["event"] == "started"]
        newest = found[begins[-1] if begins else 0 :]
        for event in newest:
            if event["event"] == "client_lost":
                lost.add(f"client-{event['client_id']}")
            elif event["event"] == "client_returned":
                lost.discard(f"client-{event['client_id']}")
    return lost


def merge_events(events_by_role: Mapping[str, Sequence[Event]], path: Path) -> None:
    """All roles' events in one file, by step and then by role; what belongs to no step comes last."""
    rows = [
        (event.get("step", math.inf), place, number, event)
        for place, events in enumerate(events_by_role.values())
        for number, event in enumerate(current_attempt(events))
    ]
    with drafted(path) as draft, draft.open("w", encoding="utf-8") as file:
        for *_, event in sorted(rows, key=lambda row: row[:3]):
            file.write(json.dumps(encode(event), allow_nan=False) + "\n")
