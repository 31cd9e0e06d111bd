"""Multiple choice by likelihood: which candidate does the model find likeliest after the prompt?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal, get_args

from hpc.errors import ConfigError, DataError, NonFinite

Normalisation = Literal["sum", "token", "byte"]


@dataclass(kw_only=True, frozen=True)
class Candidate:
    """A possible answer and what the model gives it."""

    text: str
    log_prob: float
    """Sum of its tokens' log-probabilities after the prompt, in nats."""
    tokens: int


def choose(candidates: Sequence[Candidate], normalisation: Normalisation = "sum") -> int:
    """Index of the likeliest candidate; the first of several that are equally likely.

    `sum` compares the likelihoods themselves (LM Evaluation Harness: acc), which favours short candidates; `token` the
    mean per token (GPT-3); `byte` the sum over the candidate's UTF-8 length, blanks at its ends aside (acc_norm), which
    does not depend on the tokenizer. All agree where candidates are equally long, as Yes and No mostly are.

    Raises `DataError` for no candidates or an empty one, `NonFinite` for a likelihood that is not a number.
    """
    if not candidates:
        raise DataError("no candidates to choose from; a multiple-choice record needs at least one")
    scores = [_score(candidate, normalisation) for candidate in candidates]
    return scores.index(max(scores))


def _score(candidate: Candidate, normalisation: Normalisation) -> float:
    lengths: Mapping[str, int] = {
        "sum": 1,
        "token": candidate.tokens,
        "byte": len(candidate.text.strip().encode()),
    }
    if normalisation not in lengths:
        raise ConfigError(
            f"normalisation {normalisation!r} is unknown; choose one of {', '.join(get_args(Normalisation))}"
        )
    if isnan(candidate.log_prob):
        raise NonFinite(
            f"the likelihood of candidate {candidate.text!r:.60} is not a number; look at the model's weights"
        )
    if not lengths[normalisation]:
        raise DataError(f"candidate {candidate.text!r:.60} is empty; every candidate must have text and tokens")
    return candidate.log_prob / lengths[normalisation]
