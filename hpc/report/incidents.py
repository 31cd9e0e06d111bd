"""What happened beside plain steps: steps left out, clients lost, an early stop, averages. From events; pure."""

from __future__ import annotations

import statistics
from typing import Any

from hpc.report.times import EventsByRole, by_step, events_named, or_none

NOBODY = -1  # the trunk's own gradient was not finite, or one that cannot be traced to a client


def incident_figures(events: EventsByRole) -> dict[str, Any]:
    """`skipped_steps`, `nonfinite`, `lost_clients`, `returned_clients`, `refused_clients`, `failed_checkpoints`,
    `stopped_early_at` and `averages`.
    """
    nonfinite = _notes(events, "nonfinite", "step", "client_id", "what")
    for note in nonfinite:
        note["client_id"] = None if note["client_id"] == NOBODY else note["client_id"]
    # A step may be skipped without anybody being named (the loss scale of fp16), and a named step left without figures.
    skipped = {event["step"] for event in events_named(events, "step") if event.get("skipped")}
    stops = events_named(events, "early_stop")
    # Averaging ends when the slowest trunk rank is done.
    averages = [max(part["seconds"] for part in parts) for parts in by_step(events_named(events, "average")).values()]
    return {
        "skipped_steps": len(skipped | {note["step"] for note in nonfinite}),
        "nonfinite": nonfinite,
        "lost_clients": _notes(events, "client_lost", "step", "client_id", "why"),
        "returned_clients": _notes(events, "client_returned", "step", "client_id"),
        "refused_clients": _notes(events, "client_refused", "client_id", "why"),
        "failed_checkpoints": _failed_checkpoints(events),
        "stopped_early_at": stops[-1]["step"] if stops else None,
        "averages": {"count": len(averages), "seconds": or_none(statistics.fmean, averages)},
    }


def _failed_checkpoints(events: EventsByRole) -> list[dict[str, Any]]:
    """One entry a step, with what each role says of it: the coordinator who failed, and that role the reason."""
    steps: dict[int, list[str]] = {}
    for note in _notes(events, "checkpoint_failed", "step", "why"):
        steps.setdefault(note["step"], []).append(note["why"])
    return [{"step": step, "why": "; ".join(reasons)} for step, reasons in steps.items()]


def _notes(events: EventsByRole, name: str, *keys: str) -> list[dict[str, Any]]:
    """The notes called `name`, by step; what several trunk ranks say alike counts once."""
    said = dict.fromkeys(tuple(event.get(key) for key in keys) for event in events_named(events, name))
    return sorted((dict(zip(keys, values, strict=True)) for values in said), key=lambda note: note.get("step", 0))
