"""What `--dry_run` counts with: a preset's section `estimate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc.reproduce import sections


@dataclass(kw_only=True, frozen=True)
class Assumptions:
    """See the module."""

    tflops: float = 0.05
    """Floating-point operations a second that a run comes to (10^12); the default is about that of a CPU core."""
    start_s: float = 10.0
    """Until a run's first step (seconds)."""
    held_out: Mapping[str, int] = field(default_factory=dict)
    """Task → all of its held-out examples, where these are fewer than `data.val_examples` of each client."""
    candidates: int = 10
    """Of a question that has candidates of its own (ReCoRD): each is a row."""


def assumptions(content: object) -> Assumptions:
    """The section, or the defaults where it is missing. Raises `ValueError` that names the place."""
    given = sections.section({} if content is None else content, "estimate", Assumptions)
    held_out = sections.mapping(given.get("held_out") or {}, "estimate.held_out")
    for task, number in held_out.items():
        sections.at_least_one(number, f"estimate.held_out.{task}")
    found = Assumptions(**given)
    _above_zero("tflops", found.tflops)
    _above_zero("start_s", found.start_s)
    sections.at_least_one(found.candidates, "estimate.candidates")
    return found


def _above_zero(name: str, value: Any) -> None:
    if not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"estimate.{name} is {value!r:.40}; it must be a number above 0")
