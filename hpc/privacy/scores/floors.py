"""Guesses of somebody who has seen nothing of the victim: what an attack must beat to mean anything.

`unrelated`: other text of the same kind, row by row. `unigram`: the commonest token, everywhere. `lm_only`: at each
position what the public language model finds likeliest behind the true tokens before it, so it is told more than any
attacker knows. Shape suffixes: B = 1 row, T tokens, V vocabulary, L label positions.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from itertools import chain, cycle, islice

import torch

from hpc.model.part import LabelPositions, Part
from hpc.privacy.seen import Rows

FLOORS = ("unrelated", "unigram", "lm_only")


def unrelated(truth: Rows, others: Rows, seed: int) -> list[list[int]]:
    """For each row another one's tokens, repeated or cut to its length.

    `others`: rows of another client; where there are none, the victim's own rows stand in for each other.
    """
    drawn = random.Random(seed)
    rows = []
    for index, row in enumerate(truth):
        pool = others or [other for place, other in enumerate(truth) if place != index] or truth
        rows.append(list(islice(cycle(drawn.choice(pool)), len(row))))
    return rows


def unigram(truth: Rows, others: Rows) -> list[list[int]]:
    """The commonest token of `others` (without any, of the victim's own rows) at every place."""
    token = commonest(others or truth)
    return [[token] * len(row) for row in truth]


def commonest(rows: Rows) -> int:
    """The token that occurs most often; of several, the smallest."""
    counts = Counter(chain.from_iterable(rows))
    return min(counts, key=lambda token: (-counts[token], token))


@torch.no_grad()
def lm_only(truth: Rows, whole: Part, first: int) -> list[list[int]]:
    """The likeliest next tokens; nothing comes before a row's first, which is guessed to be `first`."""
    return [[first, *_next_tokens(row, whole)] for row in truth]


def _next_tokens(row: Sequence[int], whole: Part) -> list[int]:
    if len(row) == 1:
        return []
    position_L = torch.arange(len(row) - 1)
    positions = LabelPositions(row_L=torch.zeros_like(position_L), position_L=position_L)
    logits_LV = whole(torch.tensor([list(row)]), positions)
    ids: list[int] = logits_LV.argmax(-1).tolist()
    return ids
