"""From a ring's events to what was measured of each member, and from that to medians and ratios. Pure.

A round is one turn of every member. Rounds in which other processes took a good part of the cores do not count.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpc.report.events import Event, current_attempt

WARM_UP_TURNS = 2
QUIET_SHARE = 0.05  # of the cores' time, that others may take in every turn of a round that counts
LEAST_ROUNDS = 3  # with fewer quiet ones, all rounds count, and the table says so
Measured = dict[str, Any]
Seconds = dict[str, float]
Share = Callable[[float, float], Mapping[str, float]]


def member_measured(roles: Mapping[str, Sequence[Event]], *, steps_per_turn: int, turns: int, share: Share) -> Measured:
    """All that a suite keeps of one member of a ring: each turn, and what its roles spent in it.

    `share`: what others had of the cores between two moments. What lies behind the last turn is left out: there all
    members ran at the same time.
    """
    events = {role: current_attempt(found) for role, found in roles.items()}
    leader = "trunk-0" if "trunk-0" in events else "centralised"
    steps = {role: _steps_by_turn(found, steps_per_turn) for role, found in events.items()}
    noted = [event for event in events[leader] if event["event"] == "turn" and event["number"] <= turns]
    sent = _payload_by_turn(events)
    ended = {role: found[-1] for role, found in events.items() if found and found[-1]["event"] == "summary"}
    return {
        "steps_per_turn": steps_per_turn,
        "turns": [{**_turn(event, steps, share), "payload_bytes": sent.get(event["number"])} for event in noted],
        "average_seconds": [event["seconds"] for event in events[leader] if event["event"] == "average"],
        "peak_rss_mib": {role: event["peak_rss_mib"] for role, event in ended.items()},
    }


def _payload_by_turn(events: Mapping[str, Sequence[Event]]) -> dict[int, int]:
    """Turn → payload over all links: each trunk rank notes its own."""
    sent: dict[int, int] = defaultdict(int)
    for event in (event for found in events.values() for event in found):
        if event["event"] == "turn" and "payload" in event:
            sent[event["number"]] += event["payload"]
    return sent


def _steps_by_turn(found: Sequence[Event], steps_per_turn: int) -> dict[int, list[Event]]:
    turns: dict[int, list[Event]] = defaultdict(list)
    for event in found:
        if event["event"] == "step":
            turns[(event["step"] - 1) // steps_per_turn + 1].append(event)
    return turns


def _turn(event: Event, steps: Mapping[str, Mapping[int, Sequence[Event]]], share: Share) -> Measured:
    number, seconds = event["number"], event["seconds"]
    return {
        "number": number,
        "seconds": seconds,
        "others_share": share(event["time"] - seconds, event["time"])["others"],
        "seconds_by_role": {role: _sums(own.get(number, ())) for role, own in steps.items()},
    }


def _sums(steps: Sequence[Event]) -> Seconds:
    """What a role's steps of a turn took, by component."""
    spent: dict[str, float] = defaultdict(float)
    for step in steps:
        for name, seconds in step["seconds"].items():
            spent[name] += seconds
    return dict(spent)


def quiet_rounds(members: Mapping[str, Measured]) -> list[int]:
    """Numbers of the rounds that count, after the warm-up."""
    numbers = [turn["number"] for turn in next(iter(members.values()))["turns"]][WARM_UP_TURNS:]
    noisy = {
        turn["number"] for member in members.values() for turn in member["turns"] if turn["others_share"] > QUIET_SHARE
    }
    quiet = [number for number in numbers if number not in noisy]
    return quiet if len(quiet) >= min(LEAST_ROUNDS, len(numbers)) else numbers


def spread(values: Sequence[float]) -> Measured:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def counted(member: Measured, rounds: Sequence[int]) -> list[Measured]:
    """A member's turns that count."""
    return [turn for turn in member["turns"] if turn["number"] in rounds]


def ratios(ours: Measured, theirs: Measured, rounds: Sequence[int]) -> Measured:
    """Of the seconds, turn by turn: both members of a pair met the machine as it was at that time."""
    pairs = zip(counted(ours, rounds), counted(theirs, rounds), strict=True)
    return spread([own["seconds"] / other["seconds"] for own, other in pairs])


def member_figures(member: Measured, rounds: Sequence[int]) -> Measured:
    """What a table shows of one member."""
    turns, peaks = counted(member, rounds), member["peak_rss_mib"]
    trunk = [turn["seconds_by_role"]["trunk-0"] for turn in turns if "trunk-0" in turn["seconds_by_role"]]
    return {
        "seconds": spread([turn["seconds"] for turn in turns]),
        "trunk_idle_share": sum(s["wait"] for s in trunk) / sum(s["total"] for s in trunk) if trunk else None,
        "payload_bytes_per_turn": _median_or_none([turn["payload_bytes"] for turn in turns]) if trunk else None,
        "peak_rss_mib": {
            "trunk": _peak(peaks, "trunk-"),
            "client": _peak(peaks, "client-"),
            "uncut": _peak(peaks, "centralised"),
        },
        "profile": _profile(turns),
    }


def _peak(peaks: Mapping[str, float], kind: str) -> float | None:
    return max((peak for role, peak in peaks.items() if role.startswith(kind)), default=None)


def _profile(turns: Sequence[Measured]) -> dict[str, Seconds]:
    """Mean seconds of a turn by component, of the trunk and of the mean client.

    `between`: outside its steps; `total`: the whole turn. Where a thread reads links while others compute, the
    components overlap and are more than the total.
    """
    whole = statistics.fmean(turn["seconds"] for turn in turns)
    profile = {}
    for kind in ("trunk", "client", "centralised"):
        # A role without a step in a turn (a client that sits out) has spent nothing in it.
        spent = [own for turn in turns for role, own in turn["seconds_by_role"].items() if role.startswith(kind)]
        if spent:
            names = dict.fromkeys(name for own in spent for name in own)
            mean = {name: statistics.fmean(own.get(name, 0.0) for own in spent) for name in names}
            in_steps = mean.pop("total")
            rest = {"other": max(0.0, in_steps - sum(mean.values())), "between": max(0.0, whole - in_steps)}
            profile[kind] = {**mean, **rest, "total": whole}
    return profile


def _median_or_none(values: Sequence[float | None]) -> float | None:
    """None where not everything was counted."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known and len(known) == len(values) else None


def rounds_note(members: Mapping[str, Any]) -> str:
    """What a table says of them: how many rounds count, and what others took of the cores in them."""
    rounds = quiet_rounds(members)
    shares = [turn["others_share"] for member in members.values() for turn in counted(member, rounds)]
    total = len(next(iter(members.values()))["turns"]) - WARM_UP_TURNS
    mean, limit = 100 * sum(shares) / len(shares), 100 * QUIET_SHARE
    if max(shares) > QUIET_SHARE:
        return f"**The machine was not quiet**: in the {total} rounds other processes took {mean:.1f} % of the cores."
    return (
        f"{len(rounds)} of {total} rounds count: in the rest other processes took more than {limit:.0f} % of the cores "
        f"in some turn (in those that count, {mean:.1f} % on average)."
    )
