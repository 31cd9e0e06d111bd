"""The tasks: how a record becomes a prompt, and which answers are scored. A new task is a new row of `FORMATS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from hpc.errors import DataError

SENTENCE_ENDS = ".?!"


@dataclass(kw_only=True, frozen=True)
class Task:
    """A classification task over records with named text fields."""

    name: str
    template: str
    """Prompt with `{field}`s in it, each at most once."""
    answers: tuple[tuple[object, str], ...]
    """Label in the record → verbaliser, with the space that parts it from the prompt."""
    truncated: str
    """The one field that may lose its end when the prompt is too long."""
    label_field: str = "label"

    @property
    def verbalisers(self) -> tuple[str, ...]:
        return tuple(verbaliser for _, verbaliser in self.answers)

    @property
    def fields(self) -> tuple[str, ...]:
        """Text fields that a record must have."""
        return tuple(field for _, field, _, _ in Formatter().parse(self.template) if field)


@dataclass(kw_only=True, frozen=True)
class Example:
    """A prompt in three pieces, so that only the middle one can be shortened, and its answer."""

    before: str
    passage: str
    after: str
    verbalisers: tuple[str, ...]
    label: int
    """Index of the right verbaliser."""

    @property
    def answer(self) -> str:
        return self.verbalisers[self.label]

    def prompt(self, passage_characters: int | None = None) -> str:
        """The prompt, with no more than so many characters of the passage."""
        return self.before + self.passage[:passage_characters].rstrip() + self.after


YES_NO_BY_PASSAGE = Task(
    name="boolq",
    template="{passage}. Question: {question}? Answer:",
    answers=((True, " Yes"), (False, " No")),
    truncated="passage",
)

# Value of --data.task → the format of its records.
FORMATS: Mapping[str, Task] = {
    "ward_notes": YES_NO_BY_PASSAGE,
    "boolq": YES_NO_BY_PASSAGE,
    "jsonl": YES_NO_BY_PASSAGE,
}


def make_example(task: Task, record: Mapping[str, Any], where: str) -> Example:
    """One record as a prompt. Raises `DataError` naming `where` (file and line) and the field at fault."""
    before, passage, after = _render(task, {field: _text(record, field, where) for field in task.fields})
    return Example(
        before=before, passage=passage, after=after, verbalisers=task.verbalisers, label=_label(task, record, where)
    )


def _text(record: Mapping[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise DataError(f"{where}: no field {field!r}; the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} must be text, not {type(value).__name__} ({value!r:.40})")
    if not value.strip():
        raise DataError(f"{where}: field {field!r} is empty")
    return value.strip()


def _label(task: Task, record: Mapping[str, Any], where: str) -> int:
    allowed = [label for label, _ in task.answers]
    if task.label_field not in record:
        raise DataError(f"{where}: no field {task.label_field!r}; it must be one of {_spelt(allowed)}")
    value = record[task.label_field]
    for index, label in enumerate(allowed):
        # 1 == True in Python, but a file that says 1 may well mean something else.
        if type(value) is type(label) and value == label:
            return index
    raise DataError(f"{where}: field {task.label_field!r} is {value!r:.40}; it must be one of {_spelt(allowed)}")


def _spelt(labels: list[object]) -> str:
    return ", ".join(str(label).lower() if isinstance(label, bool) else repr(label) for label in labels)


def _render(task: Task, texts: Mapping[str, str]) -> tuple[str, str, str]:
    """The text before the truncated field, the field, and the text after it."""
    parsed = list(Formatter().parse(task.template))
    literals = [literal for literal, _, _, _ in parsed] + [""]
    pieces, current = [literals[0], "", ""], 0
    for field, literal in zip(task.fields, literals[1:], strict=False):
        text, literal = _end_once(texts[field], literal)
        if field == task.truncated:
            pieces[1:], current = [text, literal], 2
        else:
            pieces[current] += text + literal
    return pieces[0], pieces[1], pieces[2]


def _end_once(text: str, literal: str) -> tuple[str, str]:
    """A text that ends its own sentence takes the place of the template's mark, which is then `literal`'s first."""
    if text[-1] in SENTENCE_ENDS and literal[:1] and literal[0] in SENTENCE_ENDS:
        return text[:-1], text[-1] + literal[1:]
    return text, literal
