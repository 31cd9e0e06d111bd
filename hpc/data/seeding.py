"""Random streams that depend on their key only: not on the platform, the process, or draws made elsewhere.

Only `random.Random.random()` is used below: Python promises its stream for a given integer seed in every version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def stream(*key: int | str) -> random.Random:
    """The stream of a key, such as `stream(seed, "order", client_id, epoch)`."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "little"))


def below(rng: random.Random, n: int) -> int:
    """An integer in [0, n)."""
    return int(rng.random() * n)


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    return choices[below(rng, len(choices))]


def permutation(rng: random.Random, n: int) -> list[int]:
    """0 … n-1 in random order (Fisher and Yates)."""
    order = list(range(n))
    for last in range(n - 1, 0, -1):
        other = below(rng, last + 1)
        order[last], order[other] = order[other], order[last]
    return order
