"""ReCoRD's F1 and exact match: SQuAD's normalisation, the best of the accepted answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.metrics.record import exact, normalise, record, token_f1

WORDS = st.lists(st.sampled_from(["the", "London", "Bank", "bank,", "of", "U.S."]), max_size=6).map(" ".join)


def plain_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall, each word of the answer used up by one word of the prediction."""
    guessed, left = normalise(prediction).split(), normalise(answer).split()
    asked, shared = len(left), 0
    for word in guessed:
        if word in left:
            left.remove(word)
            shared += 1
    if not shared:
        return 0.0
    precision, recall = shared / len(guessed), shared / asked
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The U.S. Army,", "us army"), ("  a   cat ", "cat"), ("Theatre", "theatre"), ("O'Neil-Smith", "oneilsmith")],
)
def test_normalisation(text: str, normal: str) -> None:
    assert normalise(text) == normal


def test_the_best_of_the_accepted_answers_counts() -> None:
    # "new york city" and "york": P 1/3, R 1; "new york": P 2/3, R 1: F1 0.8
    scores = record(["New York City", "the Reeves!"], [["York", "New York"], ["Reeves"]])
    assert scores == pytest.approx({"f1": 100 * (0.8 + 1) / 2, "em": 50.0})


@pytest.mark.parametrize("nothing", ["", "  ", None])
def test_a_blank_prediction_scores_nothing(nothing: str | None) -> None:
    assert record([nothing], [["Reeves"]]) == {"f1": 0, "em": 0}
    assert record([nothing], [["The"]]) == {"f1": 0, "em": 0}


@given(WORDS, WORDS)
def test_token_f1_equals_a_plain_count_and_is_symmetric(one: str, other: str) -> None:
    assert token_f1(one, other) == pytest.approx(plain_f1(one, other))
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1


@given(WORDS.filter(lambda text: normalise(text) != ""))
def test_the_answer_itself_scores_100(answer: str) -> None:
    assert exact(answer, answer)
    assert record([answer], [[answer, "other"]]) == {"f1": 100, "em": 100}
