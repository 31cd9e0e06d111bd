"""MultiRC's own measures (Khashabi et al., NAACL 2018): every answer of a question is right or wrong by itself.

`f1_a` is the F1 of "correct" over all answers. `f1_m` is the harmonic mean of the questions' mean precision and mean
recall, as the publishers' script has it (not the mean of the questions' F1, as some libraries do); the precision of a
question of which nothing was chosen, and the recall of one with no correct answer, is 1. `em` counts the questions of
which every answer is judged rightly, `em1` those with at most one mistake.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from nltk.metrics import scores as nltk_scores

from hpc.metrics.pairs import paired, percent


@dataclass(kw_only=True, frozen=True)
class Answer:
    """What is true of one candidate answer."""

    question: Hashable
    """The same for all answers of a question, and no other's: passage and question number, for question numbers may
    repeat from passage to passage."""
    correct: bool


@dataclass(kw_only=True)
class _Judged:
    """A question's answers by number: those that are correct, those that were chosen, and the mistakes."""

    correct: set[int]
    chosen: set[int]

    @property
    def mistakes(self) -> int:
        return len(self.correct ^ self.chosen)


def multirc(predictions: Sequence[bool | None], references: Sequence[Answer]) -> dict[str, float]:
    """`f1_a`, `f1_m`, `em` and `em1` in percent.

    A prediction of `None` (no label) is a mistake: it counts as the opposite of the truth, so no measure gains by it.
    """
    questions = _by_question(paired(predictions, references))
    precision = percent(_or_one(nltk_scores.precision(q.correct, q.chosen)) for q in questions)
    recall = percent(_or_one(nltk_scores.recall(q.correct, q.chosen)) for q in questions)
    return {
        "f1_a": _f1_over_answers(questions),
        "f1_m": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "em": percent(q.mistakes == 0 for q in questions),
        "em1": percent(q.mistakes <= 1 for q in questions),
    }


def _by_question(pairs: Iterable[tuple[bool | None, Answer]]) -> list[_Judged]:
    questions: dict[Hashable, _Judged] = defaultdict(lambda: _Judged(correct=set(), chosen=set()))
    for number, (chosen, answer) in enumerate(pairs):
        judged = questions[answer.question]
        if answer.correct:
            judged.correct.add(number)
        if (chosen is None and not answer.correct) or chosen:
            judged.chosen.add(number)
    return list(questions.values())


def _f1_over_answers(questions: list[_Judged]) -> float:
    correct = {number for question in questions for number in question.correct}
    chosen = {number for question in questions for number in question.chosen}
    if not correct and not chosen:
        return 100.0  # nothing to find and nothing claimed
    return 100 * float(nltk_scores.f_measure(correct, chosen) or 0)


def _or_one(value: float | None) -> float:
    """NLTK gives None where the publishers' script says 1."""
    return 1.0 if value is None else float(value)
