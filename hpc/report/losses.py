"""Training losses from step events: of the run and of each client. Pure; all in nats per label token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc.config import Config
from hpc.report.events import Event
from hpc.report.times import EventsByRole, by_step, events_named


def missing_clients(config: Config, events: EventsByRole) -> bool:
    """Whether some client's file is not in the shared folder; a loss without it would not be the run's loss."""
    return "centralised" not in events and any(f"client-{k}" not in events for k in range(config.train.clients))


def step_losses(events: EventsByRole) -> dict[int, float]:
    """Step → mean loss over the label tokens of all clients that took part in it."""
    return mean_losses(events_named(events, "step", ("client-", "centralised")))


def mean_losses(found: Iterable[Event]) -> dict[int, float]:
    return {step: loss_per_token(parts) for step, parts in by_step(found).items()}


def loss_per_token(parts: Sequence[Event]) -> float:
    """Sum of the loss sums over the sum of label tokens; not-a-number without label tokens."""
    counted = [part for part in parts if part.get("label_tokens")]
    tokens = sum(part["label_tokens"] for part in counted)
    return _exact_sum([part["loss_sum"] for part in counted]) / tokens if tokens else math.nan


def _exact_sum(values: Sequence[float]) -> float:
    """`math.fsum`, which raises on inf - inf where a plain sum says nan."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def loss_figures(losses: Mapping[int, float], steps: Mapping[int, Any]) -> dict[str, Any]:
    """`losses` has a place for every step from the first to the last, None where nobody told a loss."""
    values = [losses.get(step) for step in range(min(steps), max(steps) + 1)] if steps else []
    known = [value for value in values if value is not None]
    return {
        "loss_first": known[0] if known else None,
        "loss_last": known[-1] if known else None,
        "losses": values,
    }


def losses_by_client(events: EventsByRole) -> dict[str, list[list[float]]]:
    """Client → [step, loss] of the steps it took part in, for the clients whose files are here."""
    return {
        role: [[step, loss_per_token(parts)] for step, parts in by_step(_with_loss(found)).items()]
        for role, found in events.items()
        if role.startswith("client-")
    }


def _with_loss(found: Iterable[Event]) -> Iterable[Event]:
    return (event for event in found if event["event"] == "step" and event["label_tokens"])
