"""BLEU-4 in percent: of a corpus of words (sacreBLEU), and of single texts by character (NLTK)."""

from __future__ import annotations

from collections.abc import Sequence

from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from sacrebleu import corpus_bleu

from hpc.metrics.pairs import is_blank, paired, percent


def english_bleu4(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU-4 by sacreBLEU's defaults (13a tokens, case kept, exponential smoothing), in percent."""
    paired(predictions, references)
    # force: silences a warning about text that looks tokenised; it changes no score.
    return float(corpus_bleu(predictions, [references], force=True).score)


def character_bleu4(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Mean of the texts' BLEU-4 over characters, with NLTK's smoothing method 3, in percent.

    A blank prediction scores 0. A text of fewer than four characters has no 4-gram, so even a perfect one stays below
    100.
    """
    return percent(_of_characters(prediction, reference) for prediction, reference in paired(predictions, references))


def _of_characters(prediction: str, reference: str) -> float:
    if is_blank(prediction) or is_blank(reference):
        return 0.0
    smoothing = SmoothingFunction().method3
    return float(sentence_bleu([list(reference.strip())], list(prediction.strip()), smoothing_function=smoothing))
