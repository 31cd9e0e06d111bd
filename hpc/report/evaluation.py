"""Held-out accuracy and loss from evaluation events: each client's, over all examples, and the mean client's. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.report.events import Event, role_order
from hpc.report.losses import loss_per_token
from hpc.report.times import EventsByRole, by_step, events_named, or_none

Steps = Mapping[int, Sequence[Event]]


def evaluation_figures(events: EventsByRole, *, missing: bool) -> dict[str, Any]:
    """Figures over all clients' held-out examples, first and last, and the same for each client.

    `missing`: some client's file is not here, so what holds for all clients is not known.
    """
    found = _by_client(events)
    counted = _without_lost(found, events)
    steps = by_step(event for own in counted for event in own.values())
    # A step that some client did not evaluate would compare two different sets of examples.
    shared = {} if missing else {step: parts for step, parts in steps.items() if len(parts) == len(counted)}
    return {
        **_figures(shared),
        **_mean_client(shared),
        "per_client": {name: _figures(by_step(found[name].values())) for name in sorted(found, key=role_order)},
        "examples": sum(max(own.items())[1]["total"] for own in counted),
    }


def _by_client(events: EventsByRole) -> dict[str, dict[int, Event]]:
    """Client → step → its evaluation. The role `centralised` evaluates for everybody."""
    found: dict[str, dict[int, Event]] = defaultdict(dict)
    for role in events:
        for event in events_named({role: events[role]}, "eval"):
            client = event.get("client_id")
            found[role if client is None else f"client-{client}"][event["step"]] = event
    return found


def _without_lost(found: Mapping[str, Mapping[int, Event]], events: EventsByRole) -> list[Mapping[int, Event]]:
    """The evaluations of clients that were there to the last; without a lost one's, the others stay comparable."""
    lost = {f"client-{event['client_id']}" for event in events_named(events, "client_lost")}
    last = max((step for own in found.values() for step in own), default=0)
    return [own for name, own in found.items() if name not in lost or last in own]


def _figures(steps: Steps) -> dict[str, Any]:
    accuracies = [[step, value] for step, parts in steps.items() if (value := _accuracy(parts)) is not None]
    losses = [[step, value] for step, parts in steps.items() if (value := _loss(parts)) is not None]
    return {
        "accuracy": accuracies[-1][1] if accuracies else None,
        "accuracy_before": _first(accuracies),
        **_exact_match(steps),
        "loss": losses[-1][1] if losses else None,
        "loss_before": _first(losses),
        "history": accuracies,
        "loss_history": losses,
    }


def _first(history: Sequence[list[Any]]) -> float | None:
    """None where the model was not evaluated before the first step."""
    return history[0][1] if history and history[0][0] == 0 else None


def _exact_match(steps: Steps) -> dict[str, float]:
    """Share of examples whose decoded answer is the right one; left out unless everybody decoded."""
    if not steps or any(part.get("matched") is None for parts in steps.values() for part in parts):
        return {}
    when = {"exact_match": max(steps), "exact_match_before": 0}
    total = sum(part["total"] for part in steps[max(steps)])
    return {
        name: sum(part["matched"] for part in steps[step]) / total
        for name, step in when.items()
        if total and step in steps
    }


def _accuracy(parts: Sequence[Event]) -> float | None:
    """None without examples, or where texts are generated instead of choices made."""
    told = [part for part in parts if part["total"]]
    if not told or any(part["correct"] is None for part in told):
        return None
    return float(sum(part["correct"] for part in told) / sum(part["total"] for part in told))


def _loss(parts: Sequence[Event]) -> float | None:
    """Nats per label token; None if somebody evaluated examples without telling their loss (old files)."""
    told = [part for part in parts if part["total"]]
    return loss_per_token(told) if told and all(part.get("label_tokens") for part in told) else None


def _mean_client(steps: Steps) -> dict[str, float | None]:
    """Unweighted means over the clients that have held-out examples, at the last and the first evaluation."""
    ends = [[part for part in parts if part["total"]] for parts in steps.values()]
    after = ends[-1] if ends else []
    before = ends[0] if 0 in steps else []
    return {
        "mean_client_accuracy": _mean([_accuracy([part]) for part in after]),
        "mean_client_accuracy_before": _mean([_accuracy([part]) for part in before]),
        "mean_client_loss": _mean([_loss([part]) for part in after]),
        "mean_client_loss_before": _mean([_loss([part]) for part in before]),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return or_none(statistics.fmean, known) if len(known) == len(values) else None
