"""From a ring's events to what was measured of each member, and from that to medians and ratios. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.report.events import Event, current_attempt

WARM_UP_TURNS = 2
Measured = dict[str, Any]
Seconds = dict[str, float]


def member_measured(roles: Mapping[str, Sequence[Event]], *, steps_per_turn: int, turns: int) -> Measured:
    """All that the suite keeps of one member of a ring: each turn, and what its roles spent in one.

    What lies behind the last turn is left out: there all members ran at the same time.
    """
    events = {role: current_attempt(found) for role, found in roles.items()}
    leader = "trunk-0" if "trunk-0" in events else "centralised"
    steps = {role: _steps_by_turn(found, steps_per_turn) for role, found in events.items()}
    noted = [event for event in events[leader] if event["event"] == "turn" and event["number"] <= turns]
    counted = range(WARM_UP_TURNS + 1, turns + 1)
    ended = {role: found[-1] for role, found in events.items() if found and found[-1]["event"] == "summary"}
    return {
        "steps_per_turn": steps_per_turn,
        "turns": [_turn(event, steps[leader][event["number"]]) for event in noted],
        "seconds_per_turn_by_role": {role: _mean_turn(found, counted) for role, found in steps.items()},
        "average_seconds": [event["seconds"] for event in events[leader] if event["event"] == "average"],
        "peak_rss_mib": {role: event["peak_rss_mib"] for role, event in ended.items()},
    }


def _steps_by_turn(found: Sequence[Event], steps_per_turn: int) -> dict[int, list[Event]]:
    turns: dict[int, list[Event]] = defaultdict(list)
    for event in found:
        if event["event"] == "step":
            turns[(event["step"] - 1) // steps_per_turn + 1].append(event)
    return turns


def _turn(event: Event, steps: Sequence[Event]) -> Measured:
    """`in_steps_s` and `wait_s` are the leader's; the rest of the turn lies between its steps."""
    sums = {name: sum(step["seconds"].get(name, 0.0) for step in steps) for name in ("total", "wait")}
    return {
        "number": event["number"],
        "seconds": event["seconds"],
        "payload_bytes": event.get("payload"),
        "in_steps_s": sums["total"],
        "wait_s": sums["wait"],
        "tokens": sum(step.get("tokens", 0) for step in steps),
    }


def _mean_turn(steps: Mapping[int, Sequence[Event]], counted: Sequence[int]) -> Seconds:
    """Mean over the counted turns of what a role spent in one, by component."""
    spent: dict[str, float] = defaultdict(float)
    for turn in counted:
        for step in steps.get(turn, []):
            for name, seconds in step["seconds"].items():
                spent[name] += seconds
    return {name: seconds / len(counted) for name, seconds in spent.items()}


def spread(values: Sequence[float]) -> Measured:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def counted(member: Measured) -> list[Measured]:
    """A member's turns without the warm-up."""
    return [turn for turn in member["turns"] if turn["number"] > WARM_UP_TURNS]


def ratios(ours: Measured, theirs: Measured) -> Measured:
    """Of the seconds, turn by turn: both members of a pair met the machine as it was at that time."""
    pairs = zip(counted(ours), counted(theirs), strict=True)
    return spread([own["seconds"] / other["seconds"] for own, other in pairs])


def member_figures(member: Measured) -> Measured:
    """What the table shows of one member."""
    turns = counted(member)
    in_steps, peaks = sum(turn["in_steps_s"] for turn in turns), member["peak_rss_mib"]
    sent = [turn["payload_bytes"] for turn in turns if turn["payload_bytes"] is not None]
    return {
        "seconds": spread([turn["seconds"] for turn in turns]),
        "trunk_idle_share": sum(turn["wait_s"] for turn in turns) / in_steps if sent else None,
        "payload_bytes_per_turn": statistics.median(sent) if sent else None,
        "peak_rss_mib": {
            "trunk": _peak(peaks, "trunk-"),
            "client": _peak(peaks, "client-"),
            "uncut": _peak(peaks, "centralised"),
        },
        "profile": _profile(member, turns),
    }


def _peak(peaks: Mapping[str, float], kind: str) -> float | None:
    return max((peak for role, peak in peaks.items() if role.startswith(kind)), default=None)


def _profile(member: Measured, turns: Sequence[Measured]) -> dict[str, Seconds]:
    """Mean seconds of a turn by component, of the trunk and of the mean client.

    `between`: outside its steps; `total`: the whole turn. Where a thread reads links while others compute, the
    components overlap and are more than the total.
    """
    by_role: Mapping[str, Seconds] = member["seconds_per_turn_by_role"]
    whole = statistics.fmean(turn["seconds"] for turn in turns)
    profile = {}
    for kind in ("trunk", "client", "centralised"):
        roles = [seconds for role, seconds in by_role.items() if role.startswith(kind)]
        if roles:
            mean = {name: statistics.fmean(role.get(name, 0.0) for role in roles) for name in roles[0]}
            in_steps = mean.pop("total")
            rest = {"other": max(0.0, in_steps - sum(mean.values())), "between": max(0.0, whole - in_steps)}
            profile[kind] = {**mean, **rest, "total": whole}
    return profile
