"""Slurm's short forms for hosts and counts. What Slurm itself makes of them: tests/slurm."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import TopologyError
from hpc.hostlist import first_host, host_names, repeated


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("gpu[03-05,9],login", ["gpu03", "gpu04", "gpu05", "gpu9", "login"]),
        ("rack[1-2]node[3-4]", ["rack1node3", "rack1node4", "rack2node3", "rack2node4"]),
        ("a,b", ["a", "b"]),
        ("one", ["one"]),
        ("r1n[7,9]-ib", ["r1n7-ib", "r1n9-ib"]),
        ("x-1.site", ["x-1.site"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
    ],
)
def test_node_lists(nodes: str, hosts: list[str]) -> None:
    assert host_names(nodes) == hosts
    assert first_host(nodes) == hosts[0]


@given(
    st.lists(
        st.tuples(st.sampled_from(["n", "gpu-", "a.b", "rack"]), st.lists(st.integers(0, 99), max_size=3)),
        min_size=1,
        max_size=3,
    )
)
def test_brackets_multiply(pieces: list[tuple[str, list[int]]]) -> None:
    """Against the product of the pieces, each written as a list in brackets."""
    text = "".join(name + (f"[{','.join(map(str, numbers))}]" if numbers else "") for name, numbers in pieces)
    choices = [[f"{name}{number}" for number in numbers] or [name] for name, numbers in pieces]
    assert host_names(text) == ["".join(each) for each in product(*choices)]


@given(st.integers(0, 200), st.integers(0, 30), st.integers(1, 4))
def test_ranges_keep_their_zeros(first: int, more: int, width: int) -> None:
    low, high = f"{first:0{width}}", f"{first + more:0{width}}"
    assert host_names(f"n[{low}-{high}]") == [f"n{number:0{width}}" for number in range(first, first + more + 1)]


@pytest.mark.parametrize("broken", ["n[a]", "n[]", "n[1-]", "n[1,,2]"])
def test_a_broken_list_is_refused(broken: str) -> None:
    with pytest.raises(TopologyError, match="node list"):
        host_names(broken)


def test_counts() -> None:
    assert repeated("2(x3),1") == [2, 2, 2, 1]
    assert repeated("4") == [4]
    with pytest.raises(TopologyError, match="counts"):
        repeated("2(y3)")
