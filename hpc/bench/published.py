"""What was published about time: FL-GLM (EMNLP 2024 main 303) and FedSEA-LLaMA (arXiv 2505.15683). Numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

CENTRALISED: Mapping[str, float] = {"FL-GLM": 0.91, "FedSEA": 381.9 / 1000}
"""Paper → seconds that its uncut model took for a sample."""


@dataclass(kw_only=True, frozen=True)
class Published:
    """One paper's row."""

    paper: str
    seconds: float
    """For one sample (FL-GLM: for a step, whose batch is one sample)."""

    @property
    def ratio(self) -> float:
        """To the same paper's uncut model."""
        return self.seconds / CENTRALISED[self.paper]


def _fl_glm(seconds_a_step: float) -> Published:
    return Published(paper="FL-GLM", seconds=seconds_a_step)


def _fedsea(seconds_for_1000: float) -> Published:
    return Published(paper="FedSEA", seconds=seconds_for_1000 / 1000)


PUBLISHED: Mapping[str, Published] = {
    "one_host": _fl_glm(1.79),
    "two_hosts": _fl_glm(4.83),
    "serial_2": _fedsea(689.2),
    "client_batch_2": _fedsea(630.0),
    "client_batch_4": _fedsea(542.2),
    "client_batch_8": _fedsea(488.6),
    "replica_2": _fedsea(348.2),
    "replica_4": _fedsea(173.5),
    "replica_8": _fedsea(86.4),
}
"""Member of the suite `efficiency` → what a paper has for it."""
