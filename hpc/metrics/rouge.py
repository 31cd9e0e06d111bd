"""ROUGE-1, ROUGE-2 and ROUGE-L: F1 of each example, averaged, in percent.

English: `rouge-score` with Porter's stemmer. Chinese: words by `jieba`, scores by `rouge-chinese`, which counts an
n-gram once however often it occurs, and whose F1 of a perfect prediction is 1 - 5e-9. The two are not comparable.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from tempfile import TemporaryDirectory

import jieba
from rouge_chinese import Rouge
from rouge_score.rouge_scorer import RougeScorer

from hpc.metrics.pairs import is_blank, paired, percent

ENGLISH = ("rouge1", "rouge2", "rougeL")
CHINESE = ("rouge-1", "rouge-2", "rouge-l")


def english_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL` in percent; a blank prediction scores 0."""
    scorer = RougeScorer(ENGLISH, use_stemmer=True)
    scores = [scorer.score(target, prediction) for prediction, target in paired(predictions, references)]
    return {name: percent(score[name].fmeasure for score in scores) for name in ENGLISH}


def chinese_rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL` in percent; a blank prediction scores 0."""
    scores = [_chinese_f1(prediction, reference) for prediction, reference in paired(predictions, references)]
    return {name: percent(score[theirs] for score in scores) for name, theirs in zip(ENGLISH, CHINESE, strict=True)}


def chinese_words(text: str) -> list[str]:
    """The text's words, punctuation marks included."""
    return list(_tokenizer().cut(text.strip()))


def _chinese_f1(prediction: str, reference: str) -> dict[str, float]:
    if is_blank(prediction) or is_blank(reference):
        return dict.fromkeys(CHINESE, 0.0)
    words = [" ".join(chinese_words(text)) for text in (prediction, reference)]
    return {name: score["f"] for name, score in Rouge().get_scores(*words)[0].items()}


@cache
def _tokenizer() -> jieba.Tokenizer:
    """jieba with its own dictionary, read once a process (about a second).

    Left alone, jieba would keep the read dictionary in the machine's shared temporary folder and trust what it finds
    there, whoever wrote it.
    """
    jieba.setLogLevel(logging.WARNING)
    tokenizer = jieba.Tokenizer()
    with TemporaryDirectory(prefix="jieba-") as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer
