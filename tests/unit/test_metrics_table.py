"""The table of metrics: every task scores what it names, counts what is no answer, and equals the reference code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpc.data.tasks import FORMATS
from hpc.errors import ConfigError
from hpc.metrics.multirc import Answer
from hpc.metrics.table import METRICS, metrics_of

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
GOLDEN = SHARED / "golden" / "metrics" / "expected.json"
MULTIRC_VAL = SHARED / "data" / "superglue" / "MultiRC" / "val.jsonl"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"no reference scores in {GOLDEN}")

YES_NO = (["Yes", None, "No"], ["Yes", "No", "No"])
SUMMARIES = (["a red cat sat on the mat", ""], ["a red cat sat on the mat", "a dog"])
# Predictions, one of them no answer, and references → the main metric.
CASES: dict[str, tuple[list[Any], list[Any], float]] = {
    **dict.fromkeys(("boolq", "cb", "copa", "rte", "ward_notes", "wic", "wsc"), (*YES_NO, 200 / 3)),
    **dict.fromkeys(("cnn_dailymail", "jsonl", "xsum"), (*SUMMARIES, 50.0)),
    "huatuo": (["注意饮食，多喝水", " "], ["注意饮食，多喝水", "建议复查"], 50.0),
    "multirc": ([True, None], [Answer(question=1, correct=True), Answer(question=1, correct=False)], 200 / 3),
    "record": (["Reeves", ""], [["Shane Reeves", "Reeves"], ["Roberts"]], 50.0),
}


@pytest.mark.parametrize("task", METRICS)
def test_a_task_scores_what_it_names_and_counts_what_is_no_answer(task: str) -> None:
    predictions, references, main = CASES[task]
    scores = METRICS[task].score(predictions, references)
    assert scores.keys() == {*METRICS[task].names, "unparsed"}
    assert scores["unparsed"] == 1
    assert scores[METRICS[task].names[0]] == pytest.approx(main, abs=1e-4)
    assert all(0 <= scores[name] <= 100 for name in METRICS[task].names)


def test_every_data_task_has_metrics() -> None:
    assert FORMATS.keys() <= METRICS.keys()


def test_cb_has_macro_f1() -> None:
    assert METRICS["cb"].score(*YES_NO)["macro_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)


def test_free_text_is_scored_in_its_language_and_labels_as_ever() -> None:
    assert metrics_of("jsonl") is metrics_of("huatuo", "en") is METRICS["xsum"]
    assert metrics_of("jsonl", "zh") is metrics_of("huatuo") is METRICS["huatuo"]
    assert metrics_of("boolq", "zh") is METRICS["boolq"]


def test_an_unknown_task_or_language_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="task 'squad' has no metrics; choose one of boolq, cb"):
        metrics_of("squad")
    with pytest.raises(ConfigError, match="language 'fr' has no metrics; choose one of en, zh"):
        metrics_of("jsonl", "fr")


@golden
def test_english_summaries_score_as_the_reference_code_has_it() -> None:
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))["english"]
    scores = METRICS["xsum"].score(case["predictions"], case["references"])
    theirs = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeL", "bleu4": "sacrebleu"}
    for name, key in theirs.items():
        assert scores[name] == pytest.approx(case["expected"][key], rel=1e-12), name


@golden
def test_chinese_answers_score_as_the_reference_code_has_it() -> None:
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))["chinese"]
    scores = METRICS["huatuo"].score(case["predictions"], case["references"])
    theirs = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l", "bleu4": "bleu-4"}
    for name, key in theirs.items():
        assert scores[name] == pytest.approx(case["expected"][key], rel=1e-12), name


@golden
@pytest.mark.skipif(not MULTIRC_VAL.exists(), reason=f"no labels in {MULTIRC_VAL}")
def test_multirc_scores_as_the_reference_code_has_it() -> None:
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))["multirc"]
    predictions, references = [], []
    truth = multirc_truth()
    for question in case["predictions"]:
        key = (question["passage_idx"], question["question_idx"])
        predictions += [bool(answer) for answer in question["answers"]]
        references += [Answer(question=key, correct=correct) for correct in truth[key]]
    scores = METRICS["multirc"].score(predictions, references)
    assert {name: scores[name] for name in METRICS["multirc"].names} == pytest.approx(case["expected"], rel=1e-12)


def multirc_truth() -> dict[tuple[int, int], list[bool]]:
    """(passage, question) → which of its answers are correct."""
    passages = [json.loads(line) for line in MULTIRC_VAL.read_text(encoding="utf-8").splitlines()]
    return {
        (passage["idx"], question["idx"]): [bool(answer["label"]) for answer in question["answers"]]
        for passage in passages
        for question in passage["passage"]["questions"]
    }
