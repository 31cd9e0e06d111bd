"""MultiRC's measures against a case worked by hand and a plain implementation of the publishers' definition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.metrics.multirc import Answer, multirc

JUDGED = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), min_size=1, max_size=24)


def plain(rows: list[tuple[int, bool, bool]]) -> dict[str, float]:
    """(question, truth, prediction) of every answer → the measures, question by question."""
    precisions, recalls, wrongs = [], [], []
    for question in {row[0] for row in rows}:
        own = [(true, guess) for q, true, guess in rows if q == question]
        agreed = sum(true and guess for true, guess in own)
        chosen, correct = sum(guess for _, guess in own), sum(true for true, _ in own)
        precisions.append(agreed / chosen if chosen else 1.0)
        recalls.append(agreed / correct if correct else 1.0)
        wrongs.append(sum(true != guess for true, guess in own))
    questions = len(wrongs)
    precision, recall = sum(precisions) / questions, sum(recalls) / questions
    agreed = sum(true and guess for _, true, guess in rows)
    claimed = sum(guess for *_, guess in rows) + sum(true for _, true, _ in rows)
    return {
        "f1_a": 200 * agreed / claimed if claimed else 100.0,
        "f1_m": 200 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "em": 100 * wrongs.count(0) / questions,
        "em1": 100 * sum(wrong <= 1 for wrong in wrongs) / questions,
    }


def of(*rows: tuple[object, bool, bool | None]) -> dict[str, float]:
    return multirc([guess for *_, guess in rows], [Answer(question=q, correct=true) for q, true, _ in rows])


def test_two_questions_by_hand() -> None:
    # Question 1: one of two correct answers chosen, P 1, R 1/2. Question 2: the right one and a wrong one, P 1/2, R 1.
    scores = of((1, True, True), (1, True, False), (1, False, False), (2, True, True), (2, False, True))
    assert scores == pytest.approx({"f1_a": 100 * 2 / 3, "f1_m": 75.0, "em": 0.0, "em1": 100.0})


def test_f1_m_is_no_mean_of_the_questions_f1() -> None:
    # P = (1 + 0) / 2 and R likewise, hence 50; so is the mean of F1s. One more perfect recall tells them apart.
    scores = of((1, True, True), (2, True, False), (2, False, True), (3, True, True), (3, False, True))
    precision, recall = (1 + 0 + 1 / 2) / 3, (1 + 0 + 1) / 3
    assert scores["f1_m"] == pytest.approx(200 * precision * recall / (precision + recall))
    assert scores["f1_m"] != pytest.approx(100 * (1 + 0 + 2 / 3) / 3)


def test_nothing_chosen_has_precision_one_and_nothing_correct_recall_one() -> None:
    assert of((1, True, False))["f1_m"] == 0  # P 1, R 0
    assert of((1, False, False)) == {"f1_a": 100, "f1_m": 100, "em": 100, "em1": 100}


def test_an_unparsed_judgement_is_a_mistake_either_way() -> None:
    assert of((1, True, None), (1, False, None), (1, True, True)) == of(
        (1, True, False), (1, False, True), (1, True, True)
    )


def test_equal_question_numbers_of_two_passages_stay_apart() -> None:
    rows = [(("p1", 0), True, True), (("p2", 0), True, False), (("p2", 0), True, False)]
    assert of(*rows)["em"] == 50


@settings(deadline=None)
@given(JUDGED, st.randoms())
def test_multirc_equals_a_plain_count_in_any_order(rows: list[tuple[int, bool, bool]], random: object) -> None:
    expected = pytest.approx(plain(rows))
    assert of(*rows) == expected
    random.shuffle(rows)  # type: ignore[attr-defined]
    assert of(*rows) == expected


@settings(deadline=None)
@given(JUDGED)
def test_multirc_is_bounded_and_the_truth_scores_100(rows: list[tuple[int, bool, bool]]) -> None:
    scores = of(*rows)
    assert all(0 <= value <= 100.000001 for value in scores.values())
    assert scores["em"] <= scores["em1"]
    assert of(*((q, true, true) for q, true, _ in rows)) == pytest.approx(dict.fromkeys(scores, 100))
