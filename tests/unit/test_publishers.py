"""Each task's own records become the paper's prompts and answers; what is missing or wrong is named."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
from pathlib import Path
from typing import Any, get_args

import pytest

from hpc.config import Config, DataConfig, TrainConfig
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.tasks import FORMATS, Example, make_examples
from hpc.data_config import TaskName
from hpc.errors import DataError
from tests.unit.task_records import BAKERY, FIRST, HUB, RECORDS, write_lines


def examples(task: str, record: dict[str, Any] | None = None) -> list[Example]:
    return make_examples(FORMATS[task], record or RECORDS[task], "data.jsonl:7")


def one_client(**data: Any) -> Config:
    return Config(data=DataConfig(**{"partition": "iid", **data}), train=TrainConfig(clients=1))


def test_every_task_that_can_be_named_is_in_the_table() -> None:
    assert set(get_args(TaskName)) == set(FORMATS) == {"ward_notes", *RECORDS}


@pytest.mark.parametrize("task", RECORDS)
def test_a_record_becomes_the_papers_prompt_and_answer(task: str) -> None:
    first = examples(task)[0]
    assert (first.prompt(), first.answer) == FIRST[task]


@pytest.mark.parametrize(
    ("task", "label", "answer"),
    [
        ("boolq", False, " No"),
        ("cb", "entailment", " Yes"),
        ("cb", "contradiction", " No"),
        ("copa", 1, " B"),
        ("rte", "entailment", " Yes"),
        ("wic", True, " Yes"),
        ("wsc", False, " No"),
    ],
)
def test_the_other_labels_have_the_papers_words_too(task: str, label: object, answer: str) -> None:
    assert examples(task, {**RECORDS[task], "label": label})[0].answer == answer


def test_each_answer_of_multirc_is_asked_on_its_own_and_knows_its_question_and_passage() -> None:
    found = examples("multirc")
    assert [(e.prompt().split("Question: ")[1], e.answer) for e in found] == [
        ('Who helps? Is it answer "Bo"?', " Yes"),
        ('Who helps? Is it answer "Leeds"?', " No"),
        ('What is sold? Is it answer "bread"?', " Yes"),
    ]
    assert {e.group for e in found} == {BAKERY}
    assert found[0].question == found[1].question != found[2].question
    elsewhere = copy.deepcopy(RECORDS["multirc"])
    elsewhere["passage"]["text"] += " And tea."
    assert not {e.question for e in found} & {e.question for e in examples("multirc", elsewhere)}


def test_records_entities_are_the_candidates_and_several_may_be_right() -> None:
    twice = copy.deepcopy(RECORDS["record"])
    twice["passage"]["entities"].append({"start": 0, "end": 2})
    for record in (RECORDS["record"], twice):
        (found,) = examples("record", record)
        assert (found.choices, found.kind) == ((" Ada", " Leeds", " Bo"), "candidates")
        assert (found.label, set(found.right)) == (2, {0, 2})


def test_texts_are_generated_and_have_no_choices() -> None:
    for task in ("cnn_dailymail", "xsum", "huatuo", "jsonl"):
        (found,) = examples(task)
        assert (found.kind, len(found.choices)) == ("text", 1)
    assert [FORMATS[task].language for task in ("xsum", "huatuo")] == ["en", "zh"]


def test_an_answer_of_multirc_may_be_empty_as_in_the_published_files() -> None:
    empty = changed("multirc", "", "passage", "questions", 0, "answers", 1, "text")
    assert examples("multirc", empty)[1].prompt().endswith('Question: Who helps? Is it answer ""?')


def without(task: str, *path: Any) -> dict[str, Any]:
    record: Any = copy.deepcopy(RECORDS[task])
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return record  # type: ignore[no-any-return]


FIELDS = {
    "boolq": ["passage", "question", "label"],
    "cb": ["premise", "hypothesis", "label"],
    "copa": ["premise", "choice1", "choice2", "question", "label"],
    "rte": ["premise", "hypothesis", "label"],
    "wic": ["word", "sentence1", "sentence2", "label"],
    "wsc": ["text", "target", "label"],
    "cnn_dailymail": ["article", "highlights"],
    "xsum": ["document", "summary"],
    "huatuo": ["question", "answer"],
    "jsonl": ["prompt", "answer"],
    "multirc": ["passage"],
    "record": ["passage", "qas"],
}
NESTED: list[tuple[str, tuple[Any, ...], str]] = [
    ("wsc", ("target", "span1_text"), ""),
    ("wsc", ("target", "span2_text"), ""),
    ("multirc", ("passage", "text"), ""),
    ("multirc", ("passage", "questions"), ""),
    ("multirc", ("passage", "questions", 1, "question"), ", question 1"),
    ("multirc", ("passage", "questions", 0, "answers"), ", question 0"),
    ("multirc", ("passage", "questions", 0, "answers", 1, "text"), ", question 0, answer 1"),
    ("multirc", ("passage", "questions", 0, "answers", 1, "label"), ", question 0, answer 1"),
    ("record", ("passage", "entities"), ""),
    ("record", ("passage", "entities", 1, "end"), ""),
    ("record", ("qas", 0, "query"), ", query 0"),
    ("record", ("qas", 0, "answers"), ", query 0"),
]


@pytest.mark.parametrize(
    ("task", "path", "place"),
    [(task, (name,), "") for task, names in FIELDS.items() for name in names] + NESTED,
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_missing_field_is_named_with_its_line(task: str, path: tuple[Any, ...], place: str) -> None:
    with pytest.raises(DataError, match=rf"^data.jsonl:7{place}: no field '{path[-1]}'; ") as caught:
        examples(task, without(task, *path))
    assert "\n" not in str(caught.value)


def changed(task: str, value: object, *path: Any) -> dict[str, Any]:
    record: Any = copy.deepcopy(RECORDS[task])
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return record  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        ("boolq", changed("boolq", 1, "label"), ["'label' is 1", "true, false"]),
        ("cb", changed("cb", "Neutral", "label"), ["'Neutral'", "'entailment', 'contradiction', 'neutral'"]),
        ("copa", changed("copa", True, "label"), ["'label' is True", "0, 1"]),
        ("copa", changed("copa", 2, "label"), ["'label' is 2", "0, 1"]),
        (
            "multirc",
            changed("multirc", "yes", "passage", "questions", 0, "answers", 0, "label"),
            ["question 0, answer 0", "'yes'", "1, 0"],
        ),
        ("multirc", changed("multirc", [], "passage", "questions"), ["'questions'", "not empty"]),
        ("multirc", changed("multirc", "text", "passage"), ["'passage'", "an object", "str"]),
        ("record", changed("record", "no blank", "qas", 0, "query"), ["query 0", "@placeholder", "no blank"]),
        ("record", changed("record", 999, "passage", "entities", 0, "end"), ["'entities'", "999", str(len(BAKERY))]),
        ("record", changed("record", "Cy", "qas", 0, "answers", 1, "text"), ["'Cy'", "Ada, Leeds, Bo"]),
        ("wsc", changed("wsc", 5, "target", "span1_text"), ["'span1_text'", "text", "int"]),
        ("xsum", changed("xsum", " ", "summary"), ["'summary'", "empty"]),
        ("huatuo", changed("huatuo", ["x"], "answer"), ["'answer'", "text", "list"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_wrong_value_is_named_with_what_is_allowed(task: str, record: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        examples(task, record)
    assert all(word in str(caught.value) for word in ["data.jsonl:7", *words]), caught.value


LAYOUTS = ["superglue/BoolQ", "BoolQ", "."]


@pytest.mark.parametrize("folder", LAYOUTS)
def test_a_folder_may_be_the_collection_or_the_task(tmp_path: Path, folder: str) -> None:
    for split in ("train", "val"):
        write_lines(tmp_path / folder / f"{split}.jsonl", {**RECORDS["boolq"], "question": f"in {split}"})
    config = one_client(task="boolq", data_dir=str(tmp_path))
    assert "in train?" in training_examples(config, 0)[0].prompt()
    assert "in val?" in held_out_examples(config, 0)[0].prompt()


def test_a_folder_may_be_each_clients_own(tmp_path: Path) -> None:
    for site in range(2):
        write_lines(tmp_path / f"site-{site}" / "train.jsonl", {"prompt": f"site {site}", "answer": "x"})
    data = DataConfig(task="jsonl", data_dir=str(tmp_path / "site-{client_id}"), val_examples=0)
    assert [training_examples(Config(data=data), k)[0].prompt() for k in range(2)] == ["site 0", "site 1"]


def test_another_layout_lists_what_was_looked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "BoolQ" / "training.jsonl", RECORDS["boolq"])
    (tmp_path / "readme.txt").write_text("x")
    config = one_client(task="boolq", data_dir=str(tmp_path))
    with pytest.raises(DataError) as caught:
        training_examples(config, 0)
    for word in (
        "--data.data_dir",
        "superglue/BoolQ/train.jsonl, BoolQ/train.jsonl, train.jsonl",
        "BoolQ/, readme.txt",
    ):
        assert word in str(caught.value)
    with pytest.raises(DataError, match=r"val.jsonl of boolq.*--data.val_examples 0"):
        held_out_examples(config, 0)
    with pytest.raises(DataError, match="cannot be listed: No such file"):
        training_examples(one_client(task="rte", data_dir=str(tmp_path / "nowhere")), 0)


def test_an_empty_split_is_named(tmp_path: Path) -> None:
    write_lines(tmp_path / "xsum" / "train.jsonl", RECORDS["xsum"])
    write_lines(tmp_path / "xsum" / "val.jsonl")
    config = one_client(task="xsum", data_dir=str(tmp_path))
    with pytest.raises(DataError, match=r"xsum/val.jsonl \(--data.data_dir\) holds no records of xsum"):
        held_out_examples(config, 0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for the library `datasets`, which is optional: what it was asked, and what it gives."""
    asked: dict[str, Any] = {"rows": []}

    def load_dataset(name: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked["call"] = (name, config, split)
        if isinstance(asked["rows"], Exception):
            raise asked["rows"]
        return list(asked["rows"])

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


@pytest.mark.parametrize("task", HUB)
def test_the_librarys_flat_records_are_the_same_examples(task: str, hub: dict[str, Any]) -> None:
    hub["rows"] = HUB[task]
    assert training_examples(one_client(task=task, hub_name="some/name"), 0) == examples(task)


def test_the_library_is_asked_for_the_tasks_own_configuration(hub: dict[str, Any]) -> None:
    for task, settings, split, expected in [
        ("rte", {}, training_examples, ("super_glue", "rte", "train")),
        ("wsc", {}, training_examples, ("super_glue", "wsc.fixed", "train")),
        ("cnn_dailymail", {}, held_out_examples, ("super_glue", "3.0.0", "validation")),
        ("huatuo", {}, held_out_examples, ("super_glue", None, "validation")),
        ("rte", {"hub_config": "other"}, training_examples, ("super_glue", "other", "train")),
    ]:
        hub["rows"] = HUB[task]
        split(one_client(task=task, hub_name="super_glue", **settings), 0)
        assert hub["call"] == expected


def test_what_the_library_cannot_give_is_one_line(hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = one_client(task="rte", hub_name="super_glue")
    hub["rows"] = ConnectionError("no network\nat all")
    with pytest.raises(DataError, match=r"^--data.hub_name super_glue .*rte.*train.*no network; .*--data.data_dir$"):
        training_examples(config, 0)
    hub["rows"] = []
    with pytest.raises(DataError, match="train split is empty"):
        training_examples(config, 0)
    hub["rows"] = [{**RECORDS["rte"], "label": -1}]  # as in a test split, whose labels are secret
    with pytest.raises(DataError, match=r"super_glue train row 0: field 'label' is -1; .*'not_entailment'"):
        training_examples(config, 0)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"datasets, which is not installed; pip install datasets.*--data.data_dir"):
        training_examples(config, 0)


def test_jsonl_in_boolqs_format_is_read_as_boolq(tmp_path: Path) -> None:
    config = one_client(task="jsonl", train_file=str(write_lines(tmp_path / "a", RECORDS["boolq"])))
    assert training_examples(config, 0) == examples("boolq")


def test_an_example_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        examples("boolq")[0].label = 1  # type: ignore[misc]
