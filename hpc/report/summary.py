"""From events to `summary.json`. Pure but for `write_json_atomic`."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.files import drafted
from hpc.report.evaluation import evaluation_figures
from hpc.report.events import Event, current_attempt, encode, role_order
from hpc.report.incidents import incident_figures
from hpc.report.losses import loss_figures, losses_by_client, mean_losses, missing_clients, step_losses
from hpc.report.privacy import privacy_figures
from hpc.report.times import (
    WARM_UP_STEPS,
    EventsByRole,
    by_step,
    events_named,
    or_none,
    step_seconds,
    time_figures,
)


def summarise(
    config: Config,
    events_by_role: EventsByRole,
    *,
    name: str = "run",
    commit: str | None = None,
    machine: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `summary.json`; what the events do not tell is None, never a guess.

    `name` is used if the configuration has none. `commit` and `machine` (from `hpc.report.provenance`) describe the
    reporting process and are passed through.
    """
    events = {role: current_attempt(events_by_role[role]) for role in sorted(events_by_role, key=role_order)}
    split = {role: found for role, found in events.items() if role != "baseline"}
    missing = missing_clients(config, split)
    losses = {} if missing else step_losses(split)
    seconds = step_seconds(split)
    return {
        "name": config.run.name or name,
        **_described(config, split),
        "steps": len(seconds),
        "first_step": min(seconds, default=1),
        **loss_figures(losses, seconds),
        "eval": evaluation_figures(split, missing=missing),
        **time_figures(split, seconds),
        **_link_figures(split),
        **incident_figures(split),
        "privacy": privacy_figures(split),
        "baseline": _baseline(events.get("baseline", []), losses, seconds),
        **_role_figures(events),
        "machine": dict(machine or {}),
        "git_commit": commit,
        # Last, because it is long.
        "losses_by_client": losses_by_client(split),
    }


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` so that a reader, or a crash, meets the old file or the new one, never half of one."""
    with drafted(Path(path)) as draft, draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(encode(obj), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _described(config: Config, events: EventsByRole) -> dict[str, Any]:
    """What was run, in the configuration's words, and the transport that `auto` came to."""
    cut = config.train.schedule != "centralised"
    used = [event["transport"] for event in events_named(events, "summary") if event.get("transport")]
    return {
        "schedule": config.train.schedule,
        "aggregation": config.train.resolved_aggregation,
        "clients": config.train.clients,
        "trunk_ranks": config.trunk.ranks if cut else 0,
        "seed": config.train.seed,
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "head_blocks": config.model.head_blocks,
        "tail_blocks": config.model.tail_blocks,
        "adapter": config.adapter.method,
        "task": config.data.task,
        "transport": (used[0] if used else config.link.transport) if cut else "none",
        "encryption": config.link.encryption if cut else "none",
    }


def _link_figures(events: EventsByRole) -> dict[str, Any]:
    """Bytes over all links, both directions: the mean step's, and payload of the first and the last step."""
    steps = by_step(event for event in events_named(events, "step", ("trunk-",)) if "bytes" in event)

    def total(name: str, parts: Iterable[Event]) -> int:
        return sum(part["bytes"].get(name, 0) for part in parts)

    sent = {name: or_none(statistics.fmean, [total(name, p) for p in steps.values()]) for name in ("payload", "wire")}
    has_cache = any("cached" in part["bytes"] for parts in steps.values() for part in parts)
    spared = [total("cached", parts) for parts in steps.values()] if has_cache else []
    payload = [total("payload", parts) for parts in steps.values()]
    return {
        "link_bytes_per_step": {**sent, "cached": or_none(statistics.fmean, spared)},
        # A cache fills in the first epoch, so its worth shows between these two and not in the mean.
        "link_bytes_first_step": payload[0] if payload else None,
        "link_bytes_last_step": payload[-1] if payload else None,
    }


def _baseline(
    found: Sequence[Event], losses: Mapping[int, float], split_seconds: Mapping[int, float]
) -> dict[str, Any] | None:
    """Uncut model against split, over the steps that both took in turn; None without a baseline."""
    steps = {step: parts[0] for step, parts in by_step(e for e in found if e["event"] == "step").items()}
    if not steps:
        return None
    own = mean_losses(steps.values())
    timed = [step for step in steps if step in split_seconds][WARM_UP_STEPS:]
    whole = or_none(statistics.median, [steps[step]["seconds"]["total"] for step in timed])
    split = or_none(statistics.median, [split_seconds[step] for step in timed])
    return {
        "steps": len(steps),
        "step_seconds": whole,
        "split_step_seconds": split,
        "ratio": split / whole if split is not None and whole else None,
        "loss_max_abs_difference": or_none(max, [abs(own[s] - losses[s]) for s in own if s in losses]),
        "losses": [[step, loss] for step, loss in own.items()],
    }


def _role_figures(events: EventsByRole) -> dict[str, Any]:
    """What each role says at its end. `parameters` counts a part once, however many roles hold a copy."""
    last = {role: events_named({role: found}, "summary")[-1:] for role, found in events.items()}
    ended = {role: found[0] for role, found in last.items() if found}
    parts: dict[str, Any] = {}
    for event in ended.values():
        parts = {**event["parameters"], **parts}
    said = [event["versions"] for event in ended.values() if event.get("versions")]
    return {
        "peak_rss_mib": {role: event["peak_rss_mib"] for role, event in ended.items()},
        "parameters": parts,
        "parameters_by_role": {role: event["parameters"] for role, event in ended.items()},
        "keys_read": {role: event["keys_read"] for role, event in ended.items()},
        "versions": said[0] if said else {},
    }
