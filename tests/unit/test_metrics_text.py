"""ROUGE and BLEU against plain implementations of their definitions, on words that no stemmer or tokenizer changes."""

from __future__ import annotations

import marshal
import tempfile
from collections import Counter
from itertools import chain
from math import exp, log
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.metrics.bleu import character_bleu4, english_bleu4
from hpc.metrics.rouge import _tokenizer, chinese_rouge, chinese_words, english_rouge

TEXT = st.lists(st.sampled_from(["cat", "dog", "sun", "red", "mat"]), min_size=4, max_size=9).map(" ".join)
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4)
CHINESE = st.text(alphabet="肝炎病毒复查药", min_size=4, max_size=12)
FEW = settings(deadline=None, max_examples=40)


def ngrams(tokens: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def f1(shared: int, guessed: int, true: int) -> float:
    return 200 * shared / (guessed + true) if shared else 0.0


def longest_common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, row by row."""
    row = [0] * (len(other) + 1)
    for left in one:
        above, row = row, [0]
        for column, right in enumerate(other):
            row.append(above[column] + 1 if left == right else max(above[column + 1], row[column]))
    return row[-1]


def plain_rouge(guess: list[str], true: list[str], *, repeats: bool) -> list[float]:
    """F1 of 1-grams, 2-grams and the longest common subsequence; without repeats an n-gram counts once."""
    scores = []
    for n in (1, 2):
        ours, theirs = ngrams(guess, n), ngrams(true, n)
        if not repeats:
            ours, theirs = Counter(set(ours)), Counter(set(theirs))
        scores.append(f1((ours & theirs).total(), ours.total(), theirs.total()))
    return [*scores, f1(longest_common(guess, true), len(guess), len(true))]


def plain_bleu(pairs: list[tuple[list[str], list[str]]]) -> float:
    """BLEU-4 of a corpus; the k-th order without a match counts as 1/2^k of a match (the NIST script's smoothing)."""
    logs, unmatched = [], 0
    for n in (1, 2, 3, 4):
        matches = sum((ngrams(guess, n) & ngrams(true, n)).total() for guess, true in pairs)
        if matches == 0:
            if n == 1:
                return 0.0
            unmatched += 1
        logs.append(log((matches or 2.0**-unmatched) / sum(ngrams(guess, n).total() for guess, _ in pairs)))
    guessed, true = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    return 100 * min(1.0, exp(1 - true / guessed)) * exp(sum(logs) / 4)


def test_rouge_by_hand() -> None:
    # 5 of 6 words shared; 3 of 5 pairs; the longest common subsequence is "the cat on the mat"
    scores = english_rouge(["the cat sat on the mat"], ["the cat lay on the mat"])
    assert scores == pytest.approx({"rouge1": 500 / 6, "rouge2": 60.0, "rougeL": 500 / 6})


def test_english_rouge_stems_and_ignores_case_and_marks() -> None:
    assert english_rouge(["Running dogs."], ["runs, dog!"])["rouge1"] == 100


@FEW
@given(PAIRS)
def test_english_rouge_is_the_mean_of_plain_f1s(pairs: list[tuple[str, str]]) -> None:
    plain = [plain_rouge(guess.split(), true.split(), repeats=True) for guess, true in pairs]
    means = [sum(column) / len(pairs) for column in zip(*plain, strict=True)]
    guesses, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    assert list(english_rouge(guesses, truth).values()) == pytest.approx(means)
    assert list(english_rouge(guesses[::-1], truth[::-1]).values()) == pytest.approx(means)
    assert list(english_rouge(truth, truth).values()) == pytest.approx([100, 100, 100])


@FEW
@given(CHINESE, CHINESE)
def test_chinese_rouge_counts_words_once(guess: str, true: str) -> None:
    plain = plain_rouge(chinese_words(guess), chinese_words(true), repeats=False)
    assert list(chinese_rouge([guess], [true]).values()) == pytest.approx(plain, abs=1e-4)
    if len(chinese_words(true)) > 1:  # a single word has no pair
        assert list(chinese_rouge([true], [true]).values()) == pytest.approx([100, 100, 100], abs=1e-4)


def test_chinese_words_lose_no_character() -> None:
    text = "根据您的描述，尿频和早泄可能与感染有关。Vitamin B12"
    assert "".join(chinese_words(text)) == text
    assert "感染" in chinese_words(text)


@FEW
@given(PAIRS)
def test_english_bleu_is_plain_corpus_bleu(pairs: list[tuple[str, str]]) -> None:
    guesses, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    plain = plain_bleu([(guess.split(), true.split()) for guess, true in pairs])
    assert english_bleu4(guesses, truth) == pytest.approx(plain)
    assert english_bleu4(guesses[::-1], truth[::-1]) == pytest.approx(plain)
    assert english_bleu4(truth, truth) == pytest.approx(100)


@FEW
@given(st.lists(st.tuples(CHINESE, CHINESE), min_size=1, max_size=4))
def test_character_bleu_is_the_mean_over_texts(pairs: list[tuple[str, str]]) -> None:
    plain = [plain_bleu([(list(guess), list(true))]) for guess, true in pairs]
    guesses, truth = [guess for guess, _ in pairs], [true for _, true in pairs]
    assert character_bleu4(guesses, truth) == pytest.approx(sum(plain) / len(plain))
    assert character_bleu4(truth, truth) == pytest.approx(100)


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_a_blank_text_scores_nothing(blank: str) -> None:
    scores = chain(english_rouge([blank], ["a cat"]).values(), chinese_rouge([blank], ["感染"]).values())
    assert [*scores, english_bleu4([blank], ["a cat"]), character_bleu4([blank], ["感染"])] == [0] * 8


def test_a_dictionary_in_the_shared_temporary_folder_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = tmp_path / "jieba.cache"
    planted.write_bytes(marshal.dumps(({"染": 0, "染有": 10**9}, 10**9)))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    _tokenizer.cache_clear()
    assert "感染" in chinese_words("与感染有关")
    assert list(tmp_path.iterdir()) == [planted]
