"""All scores of an attack's guesses, each with its interval and its floors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hpc.privacy.scores.interval import Score, Statistics
from hpc.privacy.scores.texts import bleu4_char, bleu4_word, fact_f1, rouge
from hpc.privacy.scores.tokens import exact_rows, token_accuracy
from hpc.privacy.seen import Rows


@dataclass(kw_only=True, frozen=True)
class Scorer:
    """How rows become texts, and texts facts."""

    tokenizer: Any
    facts_of: Callable[[str], Counter[str]]
    seed: int

    def scores(self, guesses: Rows, floors: Mapping[str, Rows], truth: Rows) -> dict[str, Score]:
        """Every score by name. The intervals of all columns draw the same rows."""
        columns = {name: self.statistics(rows, truth) for name, rows in floors.items()}
        attack = self.statistics(guesses, truth)
        return {
            name: Score(
                attack=statistics.interval(self.seed),
                floors={floor: column[name].interval(self.seed) for floor, column in columns.items()},
            )
            for name, statistics in attack.items()
        }

    def statistics(self, guesses: Rows, truth: Rows) -> dict[str, Statistics]:
        """Of each score, by name."""
        texts, true_texts = self._texts(guesses), self._texts(truth)
        return {
            "token_accuracy": token_accuracy(guesses, truth),
            "exact_rows": exact_rows(guesses, truth),
            **rouge(texts, true_texts),
            "bleu4_word": bleu4_word(texts, true_texts),
            "bleu4_char": bleu4_char(texts, true_texts),
            "fact_f1": fact_f1(texts, true_texts, self.facts_of),
        }

    def _texts(self, rows: Rows) -> list[str]:
        return [str(self.tokenizer.decode(list(row), skip_special_tokens=True)) for row in rows]
