"""JSON-lines files: read in order, and every fault named with its file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpc.data.records import file_of_client, read_examples
from hpc.data.tasks import FORMATS, Example
from hpc.errors import DataError

GOOD = {"passage": "Grass is green.", "question": "is grass green", "label": True}


def read(path: Path) -> list[Example]:
    return read_examples(path, FORMATS["jsonl"], flag="--data.train_file")


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_records_keep_their_order_and_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, "", {**GOOD, "label": False, "idx": 7}, "   ")
    assert [example.label for example in read(path)] == [0, 1]


def test_a_byte_order_mark_and_line_separators_inside_text_do_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    text = json.dumps({**GOOD, "passage": "one\u2028two\x85three"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{json.dumps(GOOD)}\r\n".encode())
    assert [e.passage for e in read(path)] == ["one\u2028two\x85three", "Grass is green"]


def test_the_clients_number_goes_into_the_path() -> None:
    assert file_of_client("data/{client_id}/train-{client_id}.jsonl", 3) == Path("data/3/train-3.jsonl")
    assert file_of_client("data/train.jsonl", 3) == Path("data/train.jsonl")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([GOOD, '{"passage": "x", '], [":2", "not JSON"]),
        ([GOOD, GOOD, [1, 2]], [":3", "object", "list"]),
        ([GOOD, "", {"passage": "x", "label": True}], [":3", "question"]),
        ([{**GOOD, "label": "true"}], [":1", "label", "'true'", "true, false"]),
        ([{**GOOD, "passage": ["x"]}], [":1", "passage", "list"]),
        ([], ["no records", "--data.train_file"]),
        (["", ""], ["no records"]),
    ],
)
def test_a_fault_is_named_with_file_and_line(tmp_path: Path, lines: list[object], words: list[str]) -> None:
    path = write(tmp_path / "broken.jsonl", *lines)
    with pytest.raises(DataError) as caught:
        read(path)
    assert all(word in str(caught.value) for word in ["broken.jsonl", *words]), caught.value


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl \(--data.train_file\) cannot be read: No such file"):
        read(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes('{"passage": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "latin.jsonl")
