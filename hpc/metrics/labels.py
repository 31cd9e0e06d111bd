"""Classification: reading a label from generated text, accuracy and macro-F1.

A prediction is a label, or `None` where the text was no label. `None` is wrong whatever the reference says: it lowers
the recall of the true class and adds to no other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from statistics import fmean

from nltk.metrics import scores as nltk_scores

from hpc.metrics.pairs import paired

OPENING = "\"'“‘([*"
# What may follow a label. Not a space: in "A man" and "No one" the first word is no label.
CLOSING = ".,;:!?)]*\"'”’。，；：！？"


def parse_label(text: str, labels: Sequence[str]) -> int | None:
    """Index of the label that a generated text gives, or `None`.

    The text's first line must begin with exactly one of the labels (in any case, quotation marks and brackets aside),
    end there or go on after a punctuation mark, and name no other label as a word of its own spelling.
    """
    line = (text.strip().splitlines() or [""])[0].lstrip(OPENING)
    found = [index for index, label in enumerate(labels) if _begins_with(line, label.strip())]
    if len(found) != 1:
        return None
    chosen = labels[found[0]].strip()
    words = {word.strip(OPENING + CLOSING) for word in line[len(chosen) :].split()}
    return None if words & {label.strip() for label in labels} - {chosen} else found[0]


def accuracy(predictions: Sequence[Hashable | None], references: Sequence[Hashable]) -> float:
    """Predictions that equal their reference, in percent."""
    pairs = paired(predictions, references)
    return 100 * float(nltk_scores.accuracy([true for _, true in pairs], [guess for guess, _ in pairs]))


def macro_f1(predictions: Sequence[Hashable | None], references: Sequence[Hashable]) -> float:
    """Unweighted mean of the classes' F1, in percent, over the classes that are predicted or true at least once."""
    pairs = paired(predictions, references)
    classes = {label for pair in pairs for label in pair} - {None}
    return 100 * fmean(_f1_of_class(label, pairs) for label in classes)


def unparsed(predictions: Sequence[object | None]) -> int:
    """Number of predictions that are no label."""
    return sum(prediction is None for prediction in predictions)


def _f1_of_class(label: Hashable, pairs: list[tuple[Hashable | None, Hashable]]) -> float:
    true = {index for index, (_, reference) in enumerate(pairs) if reference == label}
    guessed = {index for index, (guess, _) in enumerate(pairs) if guess == label}
    # NLTK gives None for a class that is never true or never predicted: none of it was found.
    return float(nltk_scores.f_measure(true, guessed) or 0)


def _begins_with(line: str, label: str) -> bool:
    if line[: len(label)].casefold() != label.casefold():
        return False
    return len(line) == len(label) or line[len(label)] in CLOSING
