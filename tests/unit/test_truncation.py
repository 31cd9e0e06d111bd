"""However short prompts must be, no task loses its question or its choices: only the passage or article is cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc.data.rows import Encoder
from hpc.data.tasks import FORMATS, make_examples
from hpc.errors import DataError
from hpc.source.tiny import tiny_llama_folder
from tests.unit.task_records import FIRST, RECORDS

LONG = " ".join(f"Sentence {number} of many." for number in range(40))

# Task → the long field's path, and what must stand before and after what is left of it.
CUT: dict[str, tuple[tuple[str, ...], str, str]] = {
    "boolq": (("passage",), "", " Question: does the bakery sell rye bread? Answer:"),
    "cb": (("premise",), '"Bo had gone"? | [MASK], "', '"'),
    "multirc": (("passage", "text"), '"', '" Question: Who helps? Is it answer "Bo"?'),
    "record": (("passage", "text"), "[", "][On Sundays [MASK] is in the shop]"),
    "rte": (("premise",), '"Ada sells something."? | [MASK], "', '"'),
    "cnn_dailymail": (("article",), "", ""),
    "xsum": (("document",), "", ""),
    "huatuo": (("question",), "", ""),
}
WHOLE = {"copa", "wic", "wsc", "jsonl"}  # short by nature, or not known which part matters less
FROM_THE_BEGINNING = {"cb", "huatuo"}


@pytest.fixture(scope="module")
def bytewise() -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))


def encoder(tokenizer: Any, source: int, target: int = 32) -> Encoder:
    return Encoder(tokenizer=tokenizer, max_source_length=source, max_target_length=target)


def lengthened(task: str) -> dict[str, Any]:
    """The record with a long passage; entities of ReCoRD stay where they are."""
    record: Any = copy.deepcopy(RECORDS[task])
    *path, last = CUT[task][0]
    inner = record
    for key in path:
        inner = inner[key]
    inner[last] = f"{LONG} {inner[last]}" if task in FROM_THE_BEGINNING else f"{inner[last]} {LONG}"
    return record  # type: ignore[no-any-return]


def test_every_task_is_here() -> None:
    assert CUT.keys() | WHOLE == set(RECORDS)


@pytest.mark.parametrize("limit", [120, 121, 200, 333])
@pytest.mark.parametrize("task", CUT)
def test_only_the_passage_is_shortened(bytewise: Any, task: str, limit: int) -> None:
    _, before, after = CUT[task]
    example = make_examples(FORMATS[task], lengthened(task), "here")[0]
    ids = encoder(bytewise, limit).prompt(example)
    text = bytewise.decode(ids)
    assert text.startswith(before)
    assert text.endswith(after)
    left = text[len(before) : len(text) - len(after)]
    assert (
        example.passage.endswith(left) if task in FROM_THE_BEGINNING else example.passage.startswith(left.rstrip("."))
    )
    # As long as it may be, but for white space and letters of several bytes.
    assert limit - 3 <= len(ids) <= limit


@pytest.mark.parametrize("task", RECORDS)
def test_what_fits_is_whole(bytewise: Any, task: str) -> None:
    example = make_examples(FORMATS[task], RECORDS[task], "here")[0]
    assert bytewise.decode(encoder(bytewise, 600).prompt(example)) == FIRST[task][0]


@pytest.mark.parametrize("task", sorted(WHOLE))
def test_a_prompt_of_which_nothing_may_go_is_refused(bytewise: Any, task: str) -> None:
    example = make_examples(FORMATS[task], RECORDS[task], "here")[0]
    limit = len(FIRST[task][0].encode()) - 1
    with pytest.raises(DataError, match=rf"{limit + 1} tokens and nothing.*max_source_length {limit}.*template.cut"):
        encoder(bytewise, limit).prompt(example)


def test_all_candidates_are_kept_however_short_the_passage(bytewise: Any) -> None:
    example = make_examples(FORMATS["record"], lengthened("record"), "here")[0]
    short = encoder(bytewise, 60)
    assert [bytewise.decode(short.answer(example, text)) for text in example.choices] == [" Ada", " Leeds", " Bo"]
    assert "Bo" not in bytewise.decode(short.prompt(example))


def test_a_text_ends_with_the_end_of_text_or_is_cut(bytewise: Any) -> None:
    example = make_examples(FORMATS["xsum"], RECORDS["xsum"], "here")[0]
    text = bytewise("\nA bakery opened.", add_special_tokens=False)["input_ids"]
    assert len(text) == 17
    rows = [encoder(bytewise, 99, target).row(example) for target in (18, 17, 5)]
    assert [row.ids[row.prompt_len :] for row in rows] == [[*text, bytewise.eos_token_id], text, text[:5]]
