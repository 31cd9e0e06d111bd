"""Dealing one data set to the clients. Pure: every client computes the same partition and keeps its own share.

A partition is a list of index lists, one for each client, that together hold every index exactly once.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from hpc.data import seeding
from hpc.errors import DataError


def iid(n: int, clients: int, seed: int) -> list[list[int]]:
    """Shares of equal size (the first ones one larger where it does not divide), drawn without regard to labels.

    Raises `DataError` naming the first client that would get nothing.
    """
    order = seeding.permutation(seeding.stream(seed, "iid", n, clients), n)
    shares = [sorted(order[client::clients]) for client in range(clients)]
    return _without_empty(shares, "lower --train.clients or give more examples")


def dirichlet(labels: Sequence[int], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Label-skewed shares: each label's examples are split by proportions drawn from Dirichlet(alpha, …, alpha).

    Hsu et al., 2019 (arXiv 1909.06335): alpha → ∞ is balanced, alpha → 0 gives each label to one client.
    Raises `DataError` naming the first client that would get nothing.
    """
    rng = seeding.stream(seed, "dirichlet", len(labels), clients, repr(alpha))
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        indices = [index for index, its_label in enumerate(labels) if its_label == label]
        order = [indices[place] for place in seeding.permutation(rng, len(indices))]
        for share, piece in zip(shares, _split(order, _proportions(rng, clients, alpha)), strict=True):
            share += piece
    change = f"raise --data.alpha (it is {alpha}), lower --train.clients, or change --train.seed"
    return _without_empty([sorted(share) for share in shares], change)


def by_size(n: int, clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Size-skewed shares: their proportions are drawn from Dirichlet(alpha, …, alpha), without regard to labels.

    Raises `DataError` naming the first client that would get nothing.
    """
    rng = seeding.stream(seed, "size", n, clients, repr(alpha))
    order = seeding.permutation(rng, n)
    change = f"raise --data.alpha (it is {alpha}), lower --train.clients, or change --train.seed"
    return _without_empty([sorted(share) for share in _split(order, _proportions(rng, clients, alpha))], change)


def by_group(groups: Sequence[str], clients: int, seed: int) -> list[list[int]]:
    """Shares that divide no group: in random order, each goes to the client that has the fewest examples so far.

    `groups`: each example's. Raises `DataError` naming the first client that would get nothing.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    names = list(members)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for place in seeding.permutation(seeding.stream(seed, "group", len(groups), clients), len(names)):
        min(shares, key=len).extend(members[names[place]])
    change = f"there are only {len(names)} groups, which are not divided: lower --train.clients or give more examples"
    return _without_empty([sorted(share) for share in shares], change)


def _split(order: Sequence[int], proportions: Sequence[float]) -> list[Sequence[int]]:
    """The order in consecutive pieces of these proportions (rounded), the last one with what is left."""
    pieces, start, cumulated = [], 0, 0.0
    for client, proportion in enumerate(proportions):
        cumulated += proportion
        stop = len(order) if client == len(proportions) - 1 else round(cumulated * len(order))
        pieces.append(order[start:stop])
        start = stop
    return pieces


def _proportions(rng: random.Random, clients: int, alpha: float) -> list[float]:
    draws = [rng.gammavariate(alpha, 1.0) for _ in range(clients)]
    total = sum(draws)
    if total > 0:
        return [draw / total for draw in draws]
    # A tiny alpha underflows: in the limit one client takes all.
    winner = seeding.below(rng, clients)
    return [float(client == winner) for client in range(clients)]


def _without_empty(shares: list[list[int]], change: str) -> list[list[int]]:
    sizes = [len(share) for share in shares]
    if 0 in sizes:
        raise DataError(
            f"client {sizes.index(0)} is left without examples: {sum(sizes)} dealt to {len(sizes)} clients as {sizes}; "
            f"{change}"
        )
    return shares
