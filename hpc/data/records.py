"""Reading JSON-lines files into examples. Every error names the file, and the line where there is one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc.data.tasks import Example, Task, form_of, make_examples
from hpc.errors import DataError

CLIENT_ID = "{client_id}"


def file_of_client(pattern: str, client_id: int) -> Path:
    """The path with `{client_id}` replaced by the client's number (from 0)."""
    return Path(pattern.replace(CLIENT_ID, str(client_id))).expanduser()


def read_examples(path: Path, task: Task, *, flag: str) -> list[Example]:
    """All examples of a file, in its order; empty lines are skipped.

    `flag` is the option that named the file. Raises `DataError`: no such file, not UTF-8, a line that is no JSON
    object, a field that is missing or of the wrong type, an unknown label, or no record at all.
    """
    examples = examples_of(task, read_records(path, flag=flag))
    if not examples:
        raise DataError(f"{path} ({flag}) holds no records of {task.name}; expected one JSON object a line")
    return examples


def examples_of(task: Task, records: Iterable[tuple[str, Mapping[str, Any]]]) -> list[Example]:
    """The examples in records that each come with their place. The first record tells the form of `jsonl`."""
    examples: list[Example] = []
    form = None
    for where, record in records:
        form = form or form_of(task, record)
        examples += make_examples(form, record, f"{form.name}, {where}")
    return examples


def read_records(path: Path, *, flag: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and the JSON object of each line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(f"{path} ({flag}) cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} ({flag}) is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object with named fields, not {type(record).__name__}")
    return record
