"""Choosing among candidates by likelihood, and the spread over seeds."""

from __future__ import annotations

from math import inf, nan, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.errors import ConfigError, DataError, NonFinite
from hpc.metrics.choice import Candidate, choose
from hpc.metrics.spread import mean_sd

FINITE = st.floats(-1e6, 1e6)
# Likeliest as a whole, per token, and per byte ("Ålesund" has 8), in this order.
CANDIDATES = (
    Candidate(text="Oslo", log_prob=-4.0, tokens=1),
    Candidate(text=" Ålesund", log_prob=-4.8, tokens=2),
    Candidate(text="Trondheim", log_prob=-6.0, tokens=3),
)


def test_each_normalisation_by_hand() -> None:
    assert choose(CANDIDATES) == 0  # -4, -4.8, -6
    assert choose(CANDIDATES, "token") == 2  # -4, -2.4, -2
    assert choose(CANDIDATES, "byte") == 1  # -1, -0.6, -0.667


@given(st.lists(FINITE, min_size=1, max_size=6), st.sampled_from(["sum", "token", "byte"]))
def test_equally_long_candidates_are_ranked_by_their_sum(log_probs: list[float], normalisation: str) -> None:
    candidates = [Candidate(text="Yes", log_prob=log_prob, tokens=1) for log_prob in log_probs]
    chosen = choose(candidates, normalisation)  # type: ignore[arg-type]
    assert chosen == log_probs.index(max(log_probs))


def test_of_equally_likely_candidates_the_first_is_chosen() -> None:
    assert choose([Candidate(text="A", log_prob=-1, tokens=1), Candidate(text="B", log_prob=-1, tokens=1)]) == 0


def test_an_impossible_candidate_loses() -> None:
    assert choose([Candidate(text="A", log_prob=-inf, tokens=1), Candidate(text="B", log_prob=-9, tokens=1)]) == 1


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DataError, match="no candidates"):
        choose([])
    with pytest.raises(DataError, match="is empty"):
        choose([Candidate(text=" ", log_prob=-1, tokens=1)], "byte")
    with pytest.raises(NonFinite, match="'Bergen' is not a number"):
        choose([*CANDIDATES, Candidate(text="Bergen", log_prob=nan, tokens=2)])
    with pytest.raises(ConfigError, match="choose one of sum, token, byte"):
        choose(CANDIDATES, "char")  # type: ignore[arg-type]


def test_spread_by_hand() -> None:
    assert mean_sd([80, 82, 84]) == (82, 2)  # n - 1 in the denominator
    assert mean_sd([70.5]) == (70.5, None)
    with pytest.raises(DataError, match="no values"):
        mean_sd([])


@given(st.lists(FINITE, min_size=2, max_size=8))
def test_spread_equals_its_definition(values: list[float]) -> None:
    mean, sd = mean_sd(values)
    own_mean = sum(values) / len(values)
    assert mean == pytest.approx(own_mean, abs=1e-6)
    assert sd == pytest.approx(sqrt(sum((v - own_mean) ** 2 for v in values) / (len(values) - 1)), rel=1e-6, abs=1e-3)
