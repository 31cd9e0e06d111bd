"""From events to `summary.json`. Pure but for `write_json_atomic`."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.report.events import Event, current_attempt, encode, role_order
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
    losses = _losses(config, split)
    seconds = step_seconds(split)
    return {
        "name": config.run.name or name,
        **_described(config, split),
        "steps": len(seconds),
        "first_step": min(seconds, default=1),
        **_loss_figures(losses, seconds),
        "eval": _evaluation(config, split),
        **time_figures(split, seconds),
        "link_bytes_per_step": _link_bytes(split),
        "baseline": _baseline(events.get("baseline", []), losses, seconds),
        **_role_figures(events),
        "machine": dict(machine or {}),
        "git_commit": commit,
    }


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` so that a reader, or a crash, meets the old file or the new one, never half of one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(encode(obj), indent=2, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


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


def _missing_clients(config: Config, events: EventsByRole) -> bool:
    """Whether some client's file is not in the shared folder; a loss without it would not be the run's loss."""
    return "centralised" not in events and any(f"client-{k}" not in events for k in range(config.train.clients))


def _losses(config: Config, events: EventsByRole) -> dict[int, float]:
    """Step → mean loss over that step's label tokens (nats); empty if a client's losses are not shared."""
    if _missing_clients(config, events):
        return {}
    return _mean_losses(events_named(events, "step", ("client-", "centralised")))


def _mean_losses(found: Iterable[Event]) -> dict[int, float]:
    def mean(parts: Sequence[Event]) -> float:
        tokens = sum(part["label_tokens"] for part in parts)
        return _exact_sum([part["loss_sum"] for part in parts]) / tokens if tokens else math.nan

    return {step: mean(parts) for step, parts in by_step(found).items()}


def _exact_sum(values: Sequence[float]) -> float:
    """`math.fsum`, which raises on inf - inf where a plain sum says nan."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def _loss_figures(losses: Mapping[int, float], steps: Iterable[int]) -> dict[str, Any]:
    values: list[float | None] = [losses.get(step) for step in steps]
    return {
        "loss_first": values[0] if values else None,
        "loss_last": values[-1] if values else None,
        "losses": values,
    }


def _evaluation(config: Config, events: EventsByRole) -> dict[str, Any]:
    """Accuracy over all clients' held-out examples, first and last, and the same for each client."""
    found: dict[str, dict[int, Event]] = defaultdict(dict)
    for role in events:
        for event in events_named({role: events[role]}, "eval"):
            client = event.get("client_id")
            found[role if client is None else f"client-{client}"][event["step"]] = event
    steps = by_step(event for own in found.values() for event in own.values())
    # A step that some client did not evaluate would compare two different sets of examples.
    shared = {step: parts for step, parts in steps.items() if len(parts) == len(found)}
    history = [] if _missing_clients(config, events) else _accuracies(shared)
    names = sorted(found, key=role_order)
    return {
        **_before_and_after(history),
        "per_client": {name: _before_and_after(_accuracies(by_step(found[name].values()))) for name in names},
        "history": history,
        "examples": sum(max(found[name].items())[1]["total"] for name in names),
    }


def _accuracies(steps: Mapping[int, Sequence[Event]]) -> list[list[float]]:
    totals = {step: sum(event["total"] for event in parts) for step, parts in steps.items()}
    return [[step, sum(e["correct"] for e in parts) / totals[step]] for step, parts in steps.items() if totals[step]]


def _before_and_after(history: Sequence[Sequence[float]]) -> dict[str, float | None]:
    return {
        "accuracy": history[-1][1] if history else None,
        "accuracy_before": history[0][1] if history else None,
    }


def _link_bytes(events: EventsByRole) -> dict[str, float | None]:
    """Bytes per step over all links, both directions."""
    found = [event for event in events_named(events, "step", ("trunk-",)) if "bytes" in event]
    steps = len({event["step"] for event in found})
    return {name: sum(e["bytes"][name] for e in found) / steps if steps else None for name in ("payload", "wire")}


def _baseline(
    found: Sequence[Event], losses: Mapping[int, float], split_seconds: Mapping[int, float]
) -> dict[str, Any] | None:
    """Uncut model against split, over the steps that both took in turn; None without a baseline."""
    steps = {step: parts[0] for step, parts in by_step(e for e in found if e["event"] == "step").items()}
    if not steps:
        return None
    own = _mean_losses(steps.values())
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
