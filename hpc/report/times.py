"""Where the time of a run went: step times, throughput, and the durations each role measured. Pure.

The first WARM_UP_STEPS steps are left out: they pay for buffers, compilation and cold caches.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hpc.report.events import Event

WARM_UP_STEPS = 2
COMPONENTS = ("head", "tail", "trunk", "seal", "open", "wire", "wait")
EventsByRole = Mapping[str, Sequence[Event]]
Seconds = dict[str, float]


def events_named(events: EventsByRole, name: str, kinds: Iterable[str] = ("",)) -> list[Event]:
    """All events called `name` of the roles that begin with one of `kinds`."""
    chosen = [found for role, found in events.items() if role.startswith(tuple(kinds))]
    return [event for found in chosen for event in found if event["event"] == name]


def by_step(found: Iterable[Event]) -> dict[int, list[Event]]:
    steps: dict[int, list[Event]] = defaultdict(list)
    for event in found:
        steps[event["step"]].append(event)
    return dict(sorted(steps.items()))


def steady_part(values: Sequence[Any]) -> Sequence[Any]:
    """`values` without the warm-up, or all of them if there is nothing else."""
    return values[WARM_UP_STEPS:] or values


def step_seconds(events: EventsByRole) -> dict[int, float]:
    """Step → its wall time: the slowest trunk rank's, as every step passes the trunk; else the slowest role's."""
    found = events_named(events, "step", ("trunk-",)) or events_named(events, "step")
    return {step: max(part["seconds"]["total"] for part in parts) for step, parts in by_step(found).items()}


def time_figures(events: EventsByRole, seconds: Mapping[int, float]) -> dict[str, Any]:
    """`step_seconds`, `tokens_per_second` and the durations, given each step's wall time (`step_seconds`)."""
    steady = dict(steady_part(list(seconds.items())))
    tokens = [e["tokens"] for e in events_named(events, "step", ("client-", "centralised")) if e["step"] in steady]
    by_role = {role: _mean_seconds(events_named({role: found}, "step"), steady) for role, found in events.items()}
    total = math.fsum(steady.values())
    return {
        "step_seconds": {
            "median": or_none(statistics.median, list(steady.values())),
            "p90": or_none(_p90, list(steady.values())),
        },
        "warm_up_steps": len(seconds) - len(steady),
        "tokens_per_second": sum(tokens) / total if tokens and total > 0 else None,
        "seconds_per_step": _whole_run_seconds(by_role),
        "seconds_per_step_by_role": by_role,
        **_idle_shares({role: found for role, found in by_role.items() if role.startswith("trunk-")}),
    }


def or_none(figure: Callable[[Sequence[float]], float], values: Sequence[float]) -> float | None:
    return figure(values) if values else None


def _p90(values: Sequence[float]) -> float:
    """The smallest value that at least 90% of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(0.9 * len(values)) - 1)]


def _mean_seconds(found: Sequence[Event], steps: Iterable[int]) -> Seconds:
    """Mean over `steps` of each of the role's own durations (the steps it took part in)."""
    chosen = set(steps)
    parts = [event["seconds"] for event in found if event["step"] in chosen]
    names = list(dict.fromkeys(name for part in parts for name in part))
    return {name: math.fsum(part.get(name, 0.0) for part in parts) / len(parts) for name in names}


def _idle_shares(ranks: Mapping[str, Seconds]) -> dict[str, Any]:
    """What part of its steps each trunk rank waited, and the mean over ranks (as each of them occupies a device)."""
    shares = {rank: own.get("wait", 0.0) / own["total"] for rank, own in ranks.items() if own.get("total")}
    return {
        "trunk_idle_share": or_none(statistics.fmean, list(shares.values())),
        "trunk_idle_share_by_rank": shares,
    }


def _whole_run_seconds(by_role: Mapping[str, Seconds]) -> dict[str, float | None]:
    """Seconds per step of each component.

    head, tail, trunk: the mean over those who do it. seal, open: the mean client's plus the mean trunk rank's, as
    what one end seals the other opens, one after the other. wire, wait: the trunk's view, as both ends time the same
    transfer.
    """
    clients = [seconds for role, seconds in by_role.items() if role.startswith("client-")]
    trunks = [seconds for role, seconds in by_role.items() if role.startswith("trunk-")]

    def mean(roles: Sequence[Seconds], name: str) -> float | None:
        values = [seconds[name] for seconds in roles if name in seconds]
        return math.fsum(values) / len(values) if values else None

    def both(name: str) -> float | None:
        ends = [value for value in (mean(clients, name), mean(trunks, name)) if value is not None]
        return math.fsum(ends) if ends else None

    def at_trunk(name: str) -> float | None:
        return mean(trunks or clients, name)

    rule = {"seal": both, "open": both, "wire": at_trunk, "wait": at_trunk}
    return {name: rule[name](name) if name in rule else mean(clients + trunks, name) for name in COMPONENTS}
