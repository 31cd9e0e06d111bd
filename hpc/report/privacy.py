"""What the clients' noise came to, from their last words on it."""

from __future__ import annotations

import math
from typing import Any

from hpc.report.times import EventsByRole, events_named


def privacy_figures(events: EventsByRole) -> dict[str, Any] | None:
    """Of the client with the greatest epsilon (None: without a guarantee), and `by_client` of all; None without noise.

    Releases and epsilon are what was really released, with what was repeated after an interruption.
    """
    notes = {role: events_named({role: found}, "privacy")[-1:] for role, found in events.items()}
    clients = {role: _figures(found[0]) for role, found in notes.items() if found}
    if not clients:
        return None
    worst = max(clients, key=lambda role: math.inf if clients[role]["epsilon"] is None else clients[role]["epsilon"])
    return {"client": worst, **clients[worst], "by_client": clients}


def _figures(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("event", "time", "role", "step")}
