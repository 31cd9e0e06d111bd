"""Records become prompts; broken records are refused by name."""

from __future__ import annotations

import pytest

from hpc.data.tasks import FORMATS, make_example
from hpc.errors import DataError

BOOLQ = FORMATS["boolq"]


def record(**changes: object) -> dict[str, object]:
    return {"passage": "The sky is blue", "question": "is the sky blue", "label": True, **changes}


def prompt(**changes: object) -> str:
    return make_example(BOOLQ, record(**changes), "file:1").prompt()


def test_the_papers_prompt_and_answers() -> None:
    example = make_example(BOOLQ, record(), "file:1")
    assert example.prompt() == "The sky is blue. Question: is the sky blue? Answer:"
    assert example.choices == (" Yes", " No")
    assert (example.answer, make_example(BOOLQ, record(label=False), "file:1").answer) == (" Yes", " No")


@pytest.mark.parametrize("task", ["ward_notes", "boolq"])
def test_ward_notes_are_worded_as_boolq(task: str) -> None:
    assert FORMATS[task].fields == ("passage", "question")


def test_marks_are_not_doubled() -> None:
    plain = "The sky is blue. Question: is the sky blue? Answer:"
    assert prompt(passage="The sky is blue.") == plain
    assert prompt(question="is the sky blue?") == plain
    assert prompt(passage=" The sky is blue.\n", question=" is the sky blue ? ").startswith("The sky is blue. Question")
    assert prompt(passage="Is it blue?") == "Is it blue? Question: is the sky blue? Answer:"
    assert prompt(passage="Blue...") == "Blue... Question: is the sky blue? Answer:"


def test_only_the_passage_is_shortened() -> None:
    example = make_example(BOOLQ, record(passage="The sky is blue."), "file:1")
    assert example.prompt(3) == "The. Question: is the sky blue? Answer:"
    assert example.prompt(4) == example.prompt(3)
    assert example.prompt(0) == ". Question: is the sky blue? Answer:"
    assert example.prompt(len(example.passage)) == example.prompt()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": 1}, ["data.jsonl:7", "'label'", "1", "true, false"]),
        ({"label": "yes"}, ["data.jsonl:7", "'label'", "'yes'"]),
        ({"passage": 5}, ["data.jsonl:7", "'passage'", "text", "int"]),
        ({"question": "  "}, ["data.jsonl:7", "'question'", "empty"]),
        ({"passage": None}, ["data.jsonl:7", "'passage'", "NoneType"]),
    ],
)
def test_a_bad_value_is_named(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        make_example(BOOLQ, record(**changes), "data.jsonl:7")
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("field", ["passage", "question", "label"])
def test_a_missing_field_is_named(field: str) -> None:
    broken = record()
    del broken[field]
    with pytest.raises(DataError, match=rf"data.jsonl:7: no field '{field}'"):
        make_example(BOOLQ, broken, "data.jsonl:7")
