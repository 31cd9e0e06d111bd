"""Which task is scored by what. A new task is a new row of `METRICS`.

Every value is in percent, unrounded; `unparsed` is a number of examples. Predictions and references of a row are in the
same order, one each per example:

- label tasks: the labels themselves (the verbaliser's text, or any other hashable value), `None` for text that is none;
- MultiRC: was the answer called correct (`None` for neither), and an `Answer`;
- ReCoRD: the answer's text, and the texts that are accepted;
- generation: two texts.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc.errors import ConfigError
from hpc.metrics.bleu import character_bleu4, english_bleu4
from hpc.metrics.labels import accuracy, macro_f1, unparsed
from hpc.metrics.multirc import Answer, multirc
from hpc.metrics.pairs import is_blank, paired, percent
from hpc.metrics.record import record
from hpc.metrics.rouge import chinese_rouge, english_rouge

UNPARSED = "unparsed"


@dataclass(kw_only=True, frozen=True)
class Metrics:
    """The metrics of a task."""

    names: tuple[str, ...]
    """In the order of a table's columns, the main one first; `unparsed` comes in addition."""
    score: Callable[[Sequence[Any], Sequence[Any]], dict[str, float]]
    """Predictions and references → value of each name, and `unparsed`."""


def _labels(predictions: Sequence[Hashable | None], references: Sequence[Hashable]) -> dict[str, float]:
    return {"accuracy": accuracy(predictions, references), UNPARSED: unparsed(predictions)}


def _labels_and_f1(predictions: Sequence[Hashable | None], references: Sequence[Hashable]) -> dict[str, float]:
    return {**_labels(predictions, references), "macro_f1": macro_f1(predictions, references)}


def _multirc(predictions: Sequence[bool | None], references: Sequence[Answer]) -> dict[str, float]:
    return {**multirc(predictions, references), UNPARSED: unparsed(predictions)}


def _record(predictions: Sequence[str | None], references: Sequence[Sequence[str]]) -> dict[str, float]:
    return {**record(predictions, references), UNPARSED: _blank(predictions)}


def _english(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    scores = english_rouge(predictions, references)
    return {**scores, "bleu4": english_bleu4(predictions, references), **_text(predictions, references)}


def _chinese(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    scores = chinese_rouge(predictions, references)
    return {**scores, "bleu4": character_bleu4(predictions, references), **_text(predictions, references)}


def _text(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    same = percent(guess.strip() == true.strip() for guess, true in paired(predictions, references))
    return {"exact_match": same, UNPARSED: _blank(predictions)}


def _blank(predictions: Sequence[str | None]) -> int:
    """Free text cannot be misspelt, but it can be missing."""
    return sum(is_blank(prediction) for prediction in predictions)


LABELS = Metrics(names=("accuracy",), score=_labels)
LABELS_AND_F1 = Metrics(names=("accuracy", "macro_f1"), score=_labels_and_f1)
MULTIRC = Metrics(names=("f1_a", "f1_m", "em", "em1"), score=_multirc)
RECORD = Metrics(names=("f1", "em"), score=_record)
ENGLISH = Metrics(names=("rouge1", "rouge2", "rougeL", "bleu4", "exact_match"), score=_english)
CHINESE = Metrics(names=("rouge1", "rouge2", "rougeL", "bleu4", "exact_match"), score=_chinese)

# Language of a text to be generated → its metrics. The English ones see no words in Chinese text.
OF_LANGUAGE: Mapping[str, Metrics] = {"en": ENGLISH, "zh": CHINESE}
# Task → its metrics.
METRICS: Mapping[str, Metrics] = {
    "boolq": LABELS,
    "cb": LABELS_AND_F1,
    "cnn_dailymail": ENGLISH,
    "copa": LABELS,
    "huatuo": CHINESE,
    "jsonl": ENGLISH,
    "multirc": MULTIRC,
    "record": RECORD,
    "rte": LABELS,
    "ward_notes": LABELS,
    "wic": LABELS,
    "wsc": LABELS,
    "xsum": ENGLISH,
}


def metrics_of(task: str, language: str | None = None) -> Metrics:
    """The task's row; free text in another language than the row's has that language's metrics.

    Raises `ConfigError` for a task or a language that is unknown.
    """
    if task not in METRICS:
        raise ConfigError(f"task {task!r} has no metrics; choose one of {', '.join(METRICS)}")
    if language is not None and language not in OF_LANGUAGE:
        raise ConfigError(f"language {language!r} has no metrics; choose one of {', '.join(OF_LANGUAGE)}")
    row = METRICS[task]
    return OF_LANGUAGE[language] if language and row in OF_LANGUAGE.values() else row
