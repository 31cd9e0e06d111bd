"""ReCoRD (Zhang et al., 2018): exact match and token F1 of a cloze answer, after SQuAD's normalisation."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from hpc.metrics.pairs import is_blank, paired, percent

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def record(predictions: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """`f1` and `em` in percent: the best over a query's accepted answers, averaged over queries.

    `references` holds the accepted answers of each query. A missing or blank prediction scores 0.
    """
    pairs = [("" if is_blank(guess) else str(guess), answers) for guess, answers in paired(predictions, references)]
    return {
        "f1": percent(max((token_f1(guess, answer) for answer in answers), default=0.0) for guess, answers in pairs),
        "em": percent(any(exact(guess, answer) for answer in answers) for guess, answers in pairs),
    }


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def exact(prediction: str, answer: str) -> bool:
    """Are the two the same text once normalised? A blank prediction never is."""
    return bool(prediction.strip()) and normalise(prediction) == normalise(answer)


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the two bags of normalised words, 0 to 1."""
    guessed, true = Counter(normalise(prediction).split()), Counter(normalise(answer).split())
    shared = (guessed & true).total()
    return 2 * shared / (guessed.total() + true.total()) if shared else 0.0
