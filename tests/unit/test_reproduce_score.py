"""Predictions become the task's own measures, computed here again from their definitions; broken ones are named."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from hpc.config import Config, DataConfig, ModelConfig, TemplateConfig, TrainConfig
from hpc.errors import DataError
from hpc.report.events import read_events
from hpc.reproduce.score import read_lines, score, score_run
from hpc.reproduce.score_command import scores_of
from tests.loopback import run_centralised
from tests.unit.task_records import RECORDS, write_lines


def config_of(task: Any, evaluate_by: Any = "likelihood", template: TemplateConfig | None = None) -> Config:
    source = {} if task == "ward_notes" else {"data_dir": "somewhere", "partition": "iid"}
    data = DataConfig(task=task, evaluate_by=evaluate_by, template=template or TemplateConfig(), **source)
    return Config(data=data)


def label(chosen: int, right: str, choices: tuple[str, ...] = ("Yes", "No"), **more: Any) -> dict[str, Any]:
    given = {"kind": "labels", "choices": list(choices), "chosen": chosen, "right": [right], "decoded": None}
    return {**given, "question": None, **more}


def text(decoded: str | None, right: str) -> dict[str, Any]:
    return {"kind": "text", "choices": None, "chosen": None, "decoded": decoded, "right": [right], "question": None}


def candidates(chosen: int, right: list[str], choices: list[str], decoded: str | None = None) -> dict[str, Any]:
    return label(chosen, "", tuple(choices), kind="candidates", decoded=decoded) | {"right": right}


@pytest.mark.parametrize("task", ["boolq", "copa", "rte", "wic", "wsc", "ward_notes"])
def test_labels_are_counted(task: Any) -> None:
    choices = ("A", "B") if task == "copa" else ("Yes", "No")
    lines = [label(chosen, choices[right], choices) for chosen, right in ((0, 0), (1, 0), (1, 1), (0, 1), (1, 1))]
    scored = score(lines, config_of(task))
    assert scored.metrics == {"accuracy": 60.0, "unparsed": 0}
    assert (scored.examples, scored.chosen) == (5, [0, 1, 1, 0, 1])


def f1_of_class(wanted: str, pairs: list[tuple[str | None, str]]) -> float:
    hits = sum(guess == true == wanted for guess, true in pairs)
    guessed, true = sum(guess == wanted for guess, _ in pairs), sum(true == wanted for _, true in pairs)
    return 2 * hits / (guessed + true) if hits else 0.0


YES_NO_MAYBE = ("Yes", "No", "Maybe")


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_cb_has_the_mean_of_its_classes_f1(pairs: list[tuple[int, int]]) -> None:
    found = score([label(chosen, YES_NO_MAYBE[right], YES_NO_MAYBE) for chosen, right in pairs], config_of("cb"))
    named = [(YES_NO_MAYBE[chosen], YES_NO_MAYBE[right]) for chosen, right in pairs]
    classes = {each for pair in named for each in pair}
    assert found.metrics["macro_f1"] == pytest.approx(100 * fmean(f1_of_class(each, named) for each in classes))
    assert found.metrics["accuracy"] == pytest.approx(100 * fmean(guess == true for guess, true in named))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_multirc_is_scored_over_answers_and_over_questions(rows: list[tuple[str, bool, bool]]) -> None:
    lines = [label(0 if yes else 1, "Yes" if true else "No", question=question) for question, yes, true in rows]
    found = score(lines, config_of("multirc")).metrics
    pairs = [(str(yes), str(true)) for _, yes, true in rows]
    nothing = not any(yes or true for _, yes, true in rows)
    assert found["f1_a"] == pytest.approx(100.0 if nothing else 100 * f1_of_class("True", pairs))
    questions = [[(yes, true) for q, yes, true in rows if q == name] for name in {q for q, _, _ in rows}]
    assert found["em"] == pytest.approx(100 * fmean(all(yes == true for yes, true in each) for each in questions))
    hits = [sum(yes and true for yes, true in each) for each in questions]
    precision = fmean(h / c if (c := sum(y for y, _ in q)) else 1 for h, q in zip(hits, questions, strict=True))
    recall = fmean(h / c if (c := sum(t for _, t in q)) else 1 for h, q in zip(hits, questions, strict=True))
    assert found["f1_m"] == pytest.approx(100 * harmonic_mean([precision, recall]))


def test_record_takes_the_best_of_the_accepted_answers() -> None:
    choices = ["Bo", "The Leeds Bakery", "Ada Smith"]
    lines = [
        candidates(1, ["Leeds Bakery", "Bo"], choices),  # the same but for the article
        candidates(2, ["Ada", "Bo"], choices),  # one of two words, all of one: 2/3
        candidates(0, ["Ada Smith"], choices),
    ]
    found = score(lines, config_of("record")).metrics
    assert found == {"f1": pytest.approx(100 * (1 + 2 / 3 + 0) / 3), "em": pytest.approx(100 / 3), "unparsed": 0}


def test_summaries_are_scored_by_the_reference_implementation() -> None:
    pairs = [("a red cat sat on the mats", "the red cats sit on a mat"), ("", "a dog barked"), ("it rains", "it rains")]
    found = score([text(*pair) for pair in pairs], config_of("xsum", "generation"))
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = 100 * fmean(scorer.score(right, guess)[name].fmeasure for guess, right in pairs)
        assert found.metrics[name] == pytest.approx(expected)
    assert found.metrics["unparsed"] == 1
    assert found.metrics["exact_match"] == pytest.approx(100 / 3)
    assert found.chosen == [None] * 3


def test_chinese_answers_are_compared_word_by_word() -> None:
    found = score([text("多喝水", "多喝水"), text("注意休息", "多喝水")], config_of("huatuo", "generation")).metrics
    assert (found["rouge1"], found["exact_match"]) == (pytest.approx(50, abs=1e-5), 50)
    english = score([text("多喝水", "多喝水")], config_of("xsum", "generation")).metrics
    assert english["rouge1"] == 0  # which is why the language counts
    chinese = config_of("jsonl", "generation", TemplateConfig(language="zh"))
    assert score([text("多喝水", "多喝水")], chinese).metrics["rouge1"] == pytest.approx(100, abs=1e-5)


DECODED = [("Yes", 0), ("yes, it is", 0), ("No.", 1), ("Yes or No", None), ("perhaps", None), ("", None)]


def test_decoded_labels_are_read_and_what_is_none_is_counted_and_wrong() -> None:
    lines = [label(1 - (index or 0), "Yes", decoded=decoded) for decoded, index in DECODED]
    scored = score(lines, config_of("rte", "generation"))
    assert scored.chosen == [index for _, index in DECODED]
    assert scored.metrics == {"accuracy": pytest.approx(100 * 2 / 6), "unparsed": 3}
    # By likelihood the same lines say something else: `chosen` counts.
    assert score(lines, config_of("rte")).metrics == {"accuracy": pytest.approx(100 / 6), "unparsed": 0}


def test_a_decoded_answer_of_multirc_and_of_record_that_is_none_is_a_mistake() -> None:
    lines = [label(0, "Yes", question="q", decoded="Hm"), label(1, "No", question="q", decoded="Hm")]
    found = score(lines, config_of("multirc", "generation")).metrics
    assert (found["f1_a"], found["em"], found["unparsed"]) == (0, 0, 2)
    lines = [candidates(0, ["Bo"], ["Bo", "Ada"], decoded) for decoded in ("Ada", "Bo.", "nobody")]
    found = score(lines, config_of("record", "generation")).metrics
    assert found == {"f1": pytest.approx(100 / 3), "em": pytest.approx(100 / 3), "unparsed": 1}


def test_a_file_of_ones_own_is_scored_by_its_own_answers() -> None:
    template = TemplateConfig(prompt="{note}", verbalisers={"good": " gut", "bad": " schlecht"})
    lines = [label(0, "gut", ("gut", "schlecht")), label(0, "schlecht", ("gut", "schlecht"))]
    assert score(lines, config_of("jsonl", template=template)).metrics == {"accuracy": 50.0, "unparsed": 0}
    # Without a template a file may be in BoolQ's format, which its first record tells and the configuration does not.
    assert score([label(0, "Yes")], config_of("jsonl")).metrics == {"accuracy": 100.0, "unparsed": 0}


@pytest.mark.parametrize("task", ["xsum", "rte"])
def test_what_was_not_decoded_has_no_score(task: Any) -> None:
    lines = [text(None, "a dog")] if task == "xsum" else [label(0, "Yes")]
    how = "likelihood" if task == "xsum" else "generation"
    with pytest.raises(DataError, match=r"nothing was decoded.*--data\.evaluate_by generation"):
        score(lines, config_of(task, how))


@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_a_digest_is_the_same_only_for_the_same_predictions(one: list[int], other: list[int]) -> None:
    digests = [
        score([label(chosen, "Yes", YES_NO_MAYBE) for chosen in each], config_of("cb")).digest for each in (one, other)
    ]
    assert (digests[0] == digests[1]) == (one == other)
    texts = [
        score([text("no " * chosen, "a") for chosen in each], config_of("xsum", "generation")).digest
        for each in (one, other)
    ]
    assert (texts[0] == texts[1]) == (one == other)


BROKEN = {
    "not JSON": '{"kind": "labels", ',
    "no object": "[1]",
    "no field 'right'": json.dumps({key: value for key, value in label(0, "Yes").items() if key != "right"}),
    "field 'right' is [], not a list of texts": json.dumps(label(0, "Yes") | {"right": []}),
    "field 'kind' is 'lable', not labels, candidates or text": json.dumps(label(0, "Yes", kind="lable")),
    "field 'choices' is 'Yes', not a list of texts": json.dumps(label(0, "Yes") | {"choices": "Yes"}),
    "field 'chosen' is True, not a whole number": json.dumps(label(True, "Yes")),
    "field 'chosen' is 2, and there are 2 choices": json.dumps(label(2, "Yes")),
    "do not fit 'kind' text": json.dumps(label(0, "Yes", kind="text")),
    "field 'decoded' is 5, not a text": json.dumps(label(0, "Yes", decoded=5)),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_line_is_named_with_its_file_and_field(tmp_path: Path, message: str) -> None:
    path = tmp_path / "predictions-4-client-0.jsonl"
    path.write_text(json.dumps(label(0, "Yes")) + "\n" + BROKEN[message] + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_lines(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_may_have_any_letters_in_it(tmp_path: Path) -> None:
    """Some letters end a line for `str.splitlines`, and stand as they are in JSON."""
    lines = [text("a\u2028b\x85c", "d\u2029e"), text("f", "g")]
    assert read_lines(write_lines(tmp_path / "predictions-4-client-0.jsonl", *lines)) == lines


def test_a_client_whose_file_is_missing_is_no_smaller_data_set(tmp_path: Path) -> None:
    write_lines(tmp_path / "roles" / "client-0" / "predictions-4-client-0.jsonl", label(0, "Yes"))
    with pytest.raises(DataError, match=r"client-1/predictions-4-client-1\.jsonl"):
        score_run(tmp_path, config_of("rte"), 4)
    write_lines(tmp_path / "roles" / "client-1" / "predictions-4-client-1.jsonl", label(1, "Yes"))
    assert score_run(tmp_path, config_of("rte"), 4).metrics["accuracy"] == 50


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A run in this process, with its configuration as a run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    records = [{**RECORDS["rte"], "hypothesis": f"Ada sells {n}.", "label": each} for n, each in enumerate(LABELS)]
    write_lines(folder / "data" / "train.jsonl", *records)
    write_lines(folder / "data" / "val.jsonl", *records)
    data = DataConfig(
        task="rte", data_dir=str(folder / "data"), partition="iid", max_source_length=96, save_predictions=True
    )
    train = TrainConfig(schedule="centralised", max_steps=2, per_client_batch_size=2)
    config = Config(model=ModelConfig(name_or_path="tiny-llama"), data=data, train=train)
    run_centralised(config, folder)
    given = {"task": "rte", "data_dir": "gone", "partition": "iid", "save_predictions": True}
    content = {"data": given, "train": {"schedule": "centralised"}, "model": {"name_or_path": "tiny-llama"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder, config


LABELS = ["entailment", "not_entailment", "not_entailment"] * 4


def test_the_predictions_give_the_accuracy_that_the_run_itself_counted(run: tuple[Path, Config]) -> None:
    folder, config = run
    counted: Counter[int] = Counter()
    for event in read_events(folder / "roles" / "centralised" / "metrics.jsonl"):
        if event["event"] == "eval":
            counted[event["step"]] += event["correct"]
    assert counted.keys() == {0, 2}
    for step, correct in counted.items():
        scored = score_run(folder, config, step)
        assert scored.examples == 12
        assert scored.metrics["accuracy"] == pytest.approx(100 * correct / 12)


def test_score_prints_each_evaluated_step(run: tuple[Path, Config]) -> None:
    folder, config = run
    title, head, *rows = scores_of(folder).splitlines()
    assert title.startswith("rte, ")
    assert head.split() == ["step", "accuracy", "unparsed", "examples"]
    values = [score_run(folder, config, step).metrics["accuracy"] for step in (0, 2)]
    assert [row.split() for row in rows] == [
        [str(step), f"{value:.2f}", "0", "12"] for step, value in zip((0, 2), values, strict=True)
    ]


def test_score_says_what_is_missing(run: tuple[Path, Config], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no config\.yaml, so it is no run's folder"):
        scores_of(tmp_path)
    (tmp_path / "config.yaml").write_text("data: {task: ward_notes}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no predictions \(the run was without --data\.save_predictions true\)"):
        scores_of(tmp_path)
