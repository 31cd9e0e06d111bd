"""Accuracy and macro-F1 against counts made by hand and by plain loops; which text is a label and which is none."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import DataError
from hpc.metrics.labels import accuracy, macro_f1, parse_label, unparsed

YES_NO_MAYBE = (" Yes", " No", " Maybe")
GUESSES = st.lists(st.tuples(st.sampled_from([None, "a", "b", "c"]), st.sampled_from("abc")), min_size=1, max_size=30)


def plain_macro_f1(guesses: list[str | None], truth: list[str]) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of every class in either list, averaged."""
    f1s = []
    for label in {*guesses, *truth} - {None}:
        hits = sum(g == label == t for g, t in zip(guesses, truth, strict=True))
        false_alarms = sum(g == label != t for g, t in zip(guesses, truth, strict=True))
        misses = sum(g != label == t for g, t in zip(guesses, truth, strict=True))
        f1s.append(2 * hits / (2 * hits + false_alarms + misses))
    return 100 * sum(f1s) / len(f1s)


def test_accuracy_by_hand() -> None:
    assert accuracy(["Yes", "No", None, "No"], ["Yes", "Yes", "Yes", "No"]) == 50


def test_macro_f1_by_hand() -> None:
    # Yes: 2 of 3 found, none wrong: F1 4/5. No: 1 of 1 found, one wrong: 2/3. Maybe: not found: 0.
    guesses, truth = ["Yes", "Yes", "No", "No", None], ["Yes", "Yes", "Yes", "No", "Maybe"]
    assert macro_f1(guesses, truth) == pytest.approx(100 * (4 / 5 + 2 / 3 + 0) / 3)


@settings(deadline=None)
@given(GUESSES)
def test_label_scores_equal_plain_counts_in_any_order(pairs: list[tuple[str | None, str]]) -> None:
    guesses, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    assert accuracy(guesses, truth) == pytest.approx(100 * sum(g == t for g, t in pairs) / len(pairs))
    assert macro_f1(guesses, truth) == pytest.approx(plain_macro_f1(guesses, truth))
    assert macro_f1(guesses[::-1], truth[::-1]) == pytest.approx(macro_f1(guesses, truth))
    assert 0 <= macro_f1(guesses, truth) <= 100
    assert macro_f1(truth, truth) == accuracy(truth, truth) == 100


@settings(deadline=None)
@given(GUESSES)
def test_an_unparsed_prediction_never_helps(pairs: list[tuple[str | None, str]]) -> None:
    """Made right, a prediction that is no label raises accuracy by exactly its share."""
    guesses, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    mended = [true if guess is None else guess for guess, true in pairs]
    share = 100 * unparsed(guesses) / len(pairs)
    assert accuracy(mended, truth) - accuracy(guesses, truth) == pytest.approx(share)
    assert unparsed(guesses) == guesses.count(None)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Yes", 0),
        ("yes.", 0),
        ("NO", 1),
        ('"Maybe"', 2),
        ("Yes, there is no doubt.", 0),
        ("No: the text says otherwise.\nYes", 1),
        ("\n Maybe", 2),
        ("", None),
        ("   \n", None),
        ("Yesterday", None),
        ("No one knows", None),
        ("Yes or No", None),
        ("Yes, No, Maybe", None),
        ("I think Yes", None),
        ("entailment", None),
    ],
)
def test_only_a_text_that_gives_one_label_is_one(text: str, label: int | None) -> None:
    assert parse_label(text, YES_NO_MAYBE) == label


@pytest.mark.parametrize(
    ("text", "label"), [("A", 0), ("B)", 1), ("A. It rained.", 0), ("A man fell", None), ("A: x B: y", None)]
)
def test_an_article_is_no_choice(text: str, label: int | None) -> None:
    assert parse_label(text, ("A", "B")) == label


@given(st.text(max_size=12))
def test_parsing_any_text_gives_a_label_that_the_text_begins_with_or_none(text: str) -> None:
    label = parse_label(text, YES_NO_MAYBE)
    assert label is None or YES_NO_MAYBE[label].strip().casefold() in text.casefold()


@pytest.mark.parametrize("score", [accuracy, macro_f1])
def test_predictions_without_a_partner_are_refused(score: object) -> None:
    with pytest.raises(DataError, match="1 predictions for 2 references"):
        score(["Yes"], ["Yes", "No"])  # type: ignore[operator]
    with pytest.raises(DataError, match="no predictions to score"):
        score([], [])  # type: ignore[operator]
