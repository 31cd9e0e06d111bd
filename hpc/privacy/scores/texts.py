"""Scores of texts. A guess and its truth are decoded alike; each row is one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu import corpus_bleu
from sacrebleu.metrics import BLEU

from hpc.metrics.bleu import character_bleu4
from hpc.metrics.rouge import english_rouge
from hpc.privacy.scores.interval import FloatArray, Statistics, f1, share

ORDERS = 4  # BLEU-4: n-grams of 1 to 4 words


def rouge(guesses: Sequence[str], truth: Sequence[str]) -> dict[str, Statistics]:
    """`rouge1`, `rougeL`: the mean of the rows' F1 (`hpc.metrics.rouge`)."""
    scores = [english_rouge([guess], [true]) for guess, true in zip(guesses, truth, strict=True)]
    return {name: _mean([score[name] for score in scores]) for name in ("rouge1", "rougeL")}


def bleu4_word(guesses: Sequence[str], truth: Sequence[str]) -> Statistics:
    """BLEU-4 of the rows as one corpus, by sacreBLEU's defaults, as `hpc.metrics.bleu.english_bleu4`."""
    scores = [corpus_bleu([guess], [[true]], force=True) for guess, true in zip(guesses, truth, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return Statistics(rows_RK=np.array(rows, dtype=np.float64), score=_bleu)


def bleu4_char(guesses: Sequence[str], truth: Sequence[str]) -> Statistics:
    """The mean of the rows' BLEU-4 over characters (`hpc.metrics.bleu.character_bleu4`)."""
    return _mean([character_bleu4([guess], [true]) for guess, true in zip(guesses, truth, strict=True)])


def fact_f1(guesses: Sequence[str], truth: Sequence[str], facts_of: Callable[[str], Counter[str]]) -> Statistics:
    """F1 over the words of facts, however they are ordered, of all rows together."""
    rows = [_shared(facts_of(guess), facts_of(true)) for guess, true in zip(guesses, truth, strict=True)]
    return Statistics(rows_RK=np.array(rows, dtype=np.float64), score=f1)


def _shared(guessed: Counter[str], true: Counter[str]) -> list[int]:
    return [(guessed & true).total(), guessed.total(), true.total()]


def _mean(percents: Sequence[float]) -> Statistics:
    return Statistics(rows_RK=np.array([[percent / 100, 1.0] for percent in percents]), score=share)


def _bleu(sums_K: FloatArray) -> float:
    counts, totals = sums_K[:ORDERS].astype(int).tolist(), sums_K[ORDERS : 2 * ORDERS].astype(int).tolist()
    return float(BLEU.compute_bleu(counts, totals, int(sums_K[-2]), int(sums_K[-1]), smooth_method="exp").score)
