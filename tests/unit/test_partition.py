"""Partitions are disjoint, complete, the same for everybody, and never leave a client empty-handed."""

from __future__ import annotations

import collections
import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.data.partition import by_group, by_size, dirichlet, iid
from hpc.errors import DataError

SEEDS = st.integers(min_value=0, max_value=2**32)
CLIENTS = st.integers(min_value=1, max_value=9)


def assert_partition(shares: list[list[int]], n: int, clients: int) -> None:
    assert len(shares) == clients
    assert sorted(index for share in shares for index in share) == list(range(n))
    assert all(shares)


@settings(deadline=None)  # the cores are shared
@given(n=st.integers(min_value=9, max_value=300), clients=CLIENTS, seed=SEEDS)
def test_iid_is_a_partition_of_equal_shares(n: int, clients: int, seed: int) -> None:
    shares = iid(n, clients, seed)
    assert_partition(shares, n, clients)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == iid(n, clients, seed)


@settings(deadline=None)  # the cores are shared
@given(
    labels=st.lists(st.integers(min_value=0, max_value=2), min_size=1, max_size=200),
    clients=CLIENTS,
    alpha=st.floats(min_value=1e-6, max_value=1e6),
    seed=SEEDS,
)
def test_dirichlet_is_a_partition_or_refuses(labels: list[int], clients: int, alpha: float, seed: int) -> None:
    with contextlib.suppress(DataError):  # what it says is tested below
        shares = dirichlet(labels, clients, alpha, seed)
        assert_partition(shares, len(labels), clients)
        assert shares == dirichlet(labels, clients, alpha, seed)


def test_seeds_deal_differently() -> None:
    assert iid(50, 2, 0) != iid(50, 2, 1)
    assert dirichlet([0, 1] * 50, 2, 1.0, 0) != dirichlet([0, 1] * 50, 2, 1.0, 1)


def mean_skew(alpha: float) -> float:
    """Mean distance of a client's share of label 1 from one half, over seeds that leave nobody empty-handed."""
    labels, distances = [0, 1] * 500, []
    for seed in range(40):
        try:
            shares = dirichlet(labels, 4, alpha, seed)
        except DataError:
            continue
        for share in shares:
            counted = collections.Counter(labels[index] for index in share)
            distances.append(abs(counted[1] / len(share) - 0.5))
    return sum(distances) / len(distances)


def test_a_smaller_alpha_skews_more() -> None:
    assert mean_skew(0.3) > 0.2 > 0.05 > mean_skew(100.0)


def test_a_client_without_data_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"client 2 .* 2 dealt to 4 clients as \[1, 1, 0, 0\].*--train.clients"):
        iid(2, 4, 0)
    with pytest.raises(DataError, match=r"client \d is left without examples.*--data.alpha"):
        dirichlet([0] * 20, 4, 1e-9, 0)
    with pytest.raises(DataError, match="client 0"):
        iid(0, 1, 0)


@settings(deadline=None)  # the cores are shared
@given(
    n=st.integers(min_value=1, max_value=300),
    clients=CLIENTS,
    alpha=st.floats(min_value=1e-6, max_value=1e6),
    seed=SEEDS,
)
def test_by_size_is_a_partition_or_refuses(n: int, clients: int, alpha: float, seed: int) -> None:
    with contextlib.suppress(DataError):  # what it says is tested below
        shares = by_size(n, clients, alpha, seed)
        assert_partition(shares, n, clients)
        assert shares == by_size(n, clients, alpha, seed)


@settings(deadline=None)  # the cores are shared
@given(groups=st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1, max_size=200), clients=CLIENTS, seed=SEEDS)
def test_by_group_is_a_partition_that_divides_no_group(groups: list[str], clients: int, seed: int) -> None:
    if len(set(groups)) < clients:
        with pytest.raises(DataError, match=rf"only {len(set(groups))} groups.*--train.clients"):
            by_group(groups, clients, seed)
        return
    shares = by_group(groups, clients, seed)
    assert_partition(shares, len(groups), clients)
    homes = [{groups[index] for index in share} for share in shares]
    assert sum(map(len, homes)) == len(set(groups))
    # No share is larger than another by more than a group.
    assert max(map(len, shares)) - min(map(len, shares)) <= max(collections.Counter(groups).values())
    assert shares == by_group(groups, clients, seed)


def size_ratio(alpha: float) -> float:
    """Largest share by smallest, the median over seeds that leave nobody empty-handed."""
    ratios = []
    for seed in range(40):
        with contextlib.suppress(DataError):
            sizes = [len(share) for share in by_size(1000, 4, alpha, seed)]
            ratios.append(max(sizes) / min(sizes))
    return sorted(ratios)[len(ratios) // 2]


def test_a_smaller_alpha_makes_sizes_differ_more() -> None:
    assert size_ratio(0.5) > 5 > 1.5 > size_ratio(1000.0) > 1


def test_a_client_without_data_by_size_is_named_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"client \d is left without examples.*--data.alpha \(it is 1e-09\)"):
        by_size(20, 4, 1e-9, 0)


def test_size_and_group_deal_differently_by_seed() -> None:
    assert by_size(50, 2, 5.0, 0) != by_size(50, 2, 5.0, 1)
    groups = [str(index // 3) for index in range(60)]
    assert by_group(groups, 2, 0) != by_group(groups, 2, 1)
