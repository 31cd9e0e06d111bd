"""Scores against cases worked out by hand, and intervals against what repetition shows."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpc.config import Config, DataConfig, ModelConfig, TrainConfig
from hpc.metrics.bleu import character_bleu4, english_bleu4
from hpc.metrics.rouge import english_rouge
from hpc.model.build import ModelBuilder
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.scores.facts import facts_of, plain_facts
from hpc.privacy.scores.floors import commonest, lm_only, unigram, unrelated
from hpc.privacy.scores.interval import Statistics, f1, share
from hpc.privacy.scores.table import Scorer
from hpc.privacy.scores.texts import bleu4_char, bleu4_word, fact_f1, rouge
from hpc.privacy.scores.tokens import exact_rows, token_accuracy
from tests.unit.attack_case import public_model

TRUE = ["the patient came with a fever on Monday", "she takes 20 mg of aspirin every day"]
GUESSED = ["the patient came with a cough on Monday", "he takes aspirin"]


def test_tokens_count_alike_whichever_row_they_are_in() -> None:
    truth, guesses = [(1, 2, 3, 4), (5, 6)], [(1, 2, 9, 4), (6, 5)]
    assert token_accuracy(guesses, truth).value() == pytest.approx(100 * 3 / 6)
    assert exact_rows(guesses, truth).value() == 0
    assert exact_rows([(1, 2, 3, 4), (6, 5)], truth).value() == 50


def test_texts_score_as_the_projects_metrics_do() -> None:
    whole = english_rouge(GUESSED, TRUE)
    found = rouge(GUESSED, TRUE)
    assert {name: statistics.value() for name, statistics in found.items()} == pytest.approx(
        {name: whole[name] for name in ("rouge1", "rougeL")}
    )
    assert bleu4_word(GUESSED, TRUE).value() == pytest.approx(english_bleu4(GUESSED, TRUE))
    assert bleu4_char(GUESSED, TRUE).value() == pytest.approx(character_bleu4(GUESSED, TRUE))
    # By hand: 7 of 8 words of the first; 2 of 3 and 8 of the second, P = 2/3, R = 2/8.
    assert found["rouge1"].value() == pytest.approx(100 * (7 / 8 + 2 * (2 / 3) * (2 / 8) / (2 / 3 + 2 / 8)) / 2)


def test_a_blank_guess_scores_nothing() -> None:
    blank = ["", " "]
    assert [statistics.value() for statistics in rouge(blank, TRUE).values()] == [0, 0]
    assert bleu4_word(blank, TRUE).value() == bleu4_char(blank, TRUE).value() == 0


def test_facts_of_any_text_are_numbers_and_names() -> None:
    assert plain_facts("Mr Brown takes 2.5 mg, and Brown has 12") == Counter({"mr": 1, "brown": 2, "2.5": 1, "12": 1})


def test_fact_f1_by_hand() -> None:
    true, guess = ["Anna Brown is 71 and takes 20 mg"], ["Anna Gray is 71 or 72"]
    # 4 true (anna, brown, 71, 20), 4 guessed (anna, gray, 71, 72), 2 shared.
    assert fact_f1(guess, true, plain_facts).value() == pytest.approx(50)
    assert fact_f1(["nothing"], ["nothing at all"], plain_facts).value() == 0


def test_facts_of_ward_notes_are_the_generators() -> None:
    from hpc.data.ward_notes import make_notes

    find = facts_of(Config(data=DataConfig(train_examples=8), train=TrainConfig(clients=2)))
    for note in make_notes(site=1, sites=2, split="train", count=8, seed=0):
        found = find(note.passage)
        name = note.facts["name"].split()[-1].lower()
        assert found[name] >= 1
        assert all(word in found for word in note.facts["diagnosis"].split() if word != "a")
        assert not found["the"]


def test_the_interval_of_a_share_is_about_the_normal_one() -> None:
    """400 rows of one token, a quarter right: p ± 1.96 √(p (1 - p) / n)."""
    rows = np.array([[float(index % 4 == 0), 1.0] for index in range(400)])
    found = Statistics(rows_RK=rows, score=share).interval(seed=3)
    half = 196 * math.sqrt(0.25 * 0.75 / 400)
    assert found.value == 25
    assert (found.low, found.high) == (pytest.approx(25 - half, abs=0.8), pytest.approx(25 + half, abs=0.8))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Rows of different length and difficulty: 95 % of 200 samples, at least 88 % (bootstrap is a little short)."""
    generator, covered = np.random.default_rng(0), 0
    for trial in range(200):
        tokens = generator.integers(5, 30, size=40).astype(float)
        hits = generator.binomial(tokens.astype(int), generator.beta(3, 7, size=40)).astype(float)
        found = Statistics(rows_RK=np.stack([hits, tokens], 1), score=share).interval(seed=trial)
        covered += found.low <= 30 <= found.high
    assert 176 <= covered <= 199


def test_the_interval_depends_on_the_seed_alone() -> None:
    statistics = Statistics(rows_RK=np.array([[row % 7, 10 + row % 5] for row in range(40)], float), score=share)
    assert statistics.interval(1) == statistics.interval(1) != statistics.interval(2)
    perfect = Statistics(rows_RK=np.array([[3.0, 3.0, 3.0]] * 4), score=f1).interval(0)
    assert (perfect.value, perfect.low, perfect.high) == (100, 100, 100)


def test_floors_have_the_rows_lengths_and_nothing_of_the_row() -> None:
    truth, others = [(1, 2, 3), (4, 5)], [(9, 8), (7, 7, 7, 7)]
    drawn = unrelated(truth, others, seed=0)
    assert [len(row) for row in drawn] == [3, 2]
    assert all(tuple(row) in {(9, 8, 9), (9, 8), (7, 7, 7), (7, 7)} for row in drawn)
    assert unrelated(truth, [], seed=0) == [[4, 5, 4], [1, 2]]
    assert unigram(truth, others) == [[7, 7, 7], [7, 7]]
    assert commonest([(3, 1, 1), (3,)]) == 1


def test_the_language_models_floor_is_its_own_next_token(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    public = public_model("gpt2", 1, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    rows = [(5, 17, 3, 40), (8,)]
    with torch.no_grad():
        expected = plain(torch.tensor([rows[0]])).logits[0, :-1].argmax(-1).tolist()
    assert lm_only(rows, public.whole, first=2) == [[2, *expected], [2]]


class Letters:
    """A tokenizer whose ids are letters."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))


def test_every_score_comes_with_all_of_its_floors() -> None:
    truth = [tuple(map(ord, text)) for text in TRUE]
    floor = [[ord("x")] * len(row) for row in truth]
    scorer = Scorer(tokenizer=Letters(), facts_of=plain_facts, seed=0)
    found = scorer.scores(truth, {"unigram": floor}, truth)
    assert list(found) == ["token_accuracy", "exact_rows", "rouge1", "rougeL", "bleu4_word", "bleu4_char", "fact_f1"]
    for name, score in found.items():
        assert score.attack.value == score.attack.low == pytest.approx(100), name
        assert list(score.floors) == ["unigram"]
        assert score.floors["unigram"].value < 5, name


def test_the_whole_model_has_no_adapter() -> None:
    config = Config(model=ModelConfig(name_or_path="tiny-llama"))
    whole = PublicModel.of(config).whole
    assert not whole.trainable()
    assert len(whole.blocks) == ModelBuilder.of(config).cut.blocks
