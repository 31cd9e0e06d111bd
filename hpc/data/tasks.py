"""How a record becomes a prompt, and which answers are scored. What is asked in which words: `hpc.data.templates`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from string import Formatter
from typing import Any

from hpc.data.publishers import FlatRecord, flatten, member
from hpc.data.templates import BOOLQ, ENTITY, FORMATS, Kind, Task
from hpc.data_config import spelt
from hpc.errors import DataError

__all__ = ["FORMATS", "Example", "Task", "form_of", "make_example", "make_examples"]

SENTENCE_ENDS = ".?!"


@dataclass(kw_only=True, frozen=True)
class Example:
    """A prompt in three pieces, so that only the middle one can be shortened, and its answer."""

    before: str
    passage: str
    after: str
    choices: tuple[str, ...]
    """Answers to choose from by likelihood; of a text to be generated, the reference alone."""
    label: int
    """Index of the answer that is trained on."""
    right: tuple[int, ...]
    """Indices of all right choices (ReCoRD has several)."""
    kind: Kind
    """`labels`: the same choices in every record; `candidates`: each record's own; `text`: to be generated."""
    loses: str = "end"
    """Part of the passage that goes first."""
    group: str | None = None
    """What must be on the same client."""
    question: str | None = None
    """MultiRC: examples with the same one are the answers to one question."""
    where: str = field(default="", compare=False)
    """Task, file and line."""

    @property
    def answer(self) -> str:
        return self.choices[self.label]

    def prompt(self, passage_characters: int | None = None) -> str:
        """The prompt, with no more than so many characters of the passage."""
        kept = len(self.passage) if passage_characters is None else passage_characters
        if self.loses == "end":
            return self.before + self.passage[:kept].rstrip() + self.after
        return self.before + self.passage[max(0, len(self.passage) - kept) :].lstrip() + self.after


def form_of(task: Task, record: Mapping[str, Any]) -> Task:
    """The task, or BoolQ for `jsonl` files in its format, whose first record tells: no prompt, but a question."""
    plain = task == FORMATS["jsonl"]
    return BOOLQ if plain and "prompt" not in record and {"passage", "question"} & record.keys() else task


def make_examples(task: Task, record: Mapping[str, Any], where: str) -> list[Example]:
    """All questions of one record. Raises `DataError` naming `where` (file and line) and the field at fault."""
    return [_example(task, flat) for flat in flatten(task.name, record, where)]


def make_example(task: Task, record: Mapping[str, Any], where: str) -> Example:
    """The question of a record that has one."""
    (example,) = make_examples(task, record, where)
    return example


def _example(task: Task, flat: FlatRecord) -> Example:
    where, fields = flat.where, flat.fields
    before, passage, after = _render(task, {name: _text(task, flat, name) for name in task.fields})
    choices, right = _answers(task, flat)
    group = flat.group if flat.group is not None else _group(task, fields, where)
    return Example(
        before=before,
        passage=passage,
        after=after,
        choices=choices,
        label=right[0],
        right=right,
        kind=task.kind,
        loses=task.loses,
        group=group,
        question=flat.question,
        where=where,
    )


def _answers(task: Task, flat: FlatRecord) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The choices, and the indices of the right ones."""
    if task.kind == "labels":
        return task.verbalisers, (_label(task, flat.fields, flat.where),)
    written = task.answer or ""
    if task.kind == "text":
        texts = {name: _text(task, flat, name) for name in task.answer_fields}
        return (written.format(**texts),), (0,)
    right = tuple(flat.candidates.index(text) for text in flat.right)
    return tuple(written.format(**{ENTITY: text}) for text in flat.candidates), right


def _group(task: Task, record: Mapping[str, Any], where: str) -> str | None:
    value, named = record.get(task.group_field), task.group_field != FORMATS[task.name].group_field
    if not isinstance(value, str | int):
        if not named:
            return None
        raise DataError(
            f"{where}: field {task.group_field!r} must be a text or a number to group by, not {value!r:.40}"
        )
    return str(value)


def _text(task: Task, flat: FlatRecord, name: str) -> str:
    value = str(member(flat.fields, name, str, flat.where)).strip()
    if not value and name not in task.may_be_empty:
        raise DataError(f"{flat.where}: field {name!r} is empty")
    return value


def _label(task: Task, record: Mapping[str, Any], where: str) -> int:
    allowed = [label for label, _ in task.answers]
    if task.label_field not in record:
        raise DataError(f"{where}: no field {task.label_field!r}; it must be one of {_listed(allowed)}")
    value = record[task.label_field]
    for index, label in enumerate(allowed):
        # 1 == True in Python, but a file that says 1 may well mean something else.
        if type(value) is type(label) and value == label:
            return index
        # Labels named in a configuration are text, whatever they are in the file.
        if isinstance(value, bool | int) and spelt(value) == label:
            return index
    raise DataError(f"{where}: field {task.label_field!r} is {value!r:.40}; it must be one of {_listed(allowed)}")


def _listed(labels: list[object]) -> str:
    return ", ".join(spelt(label) if isinstance(label, bool) else repr(label) for label in labels)


def _render(task: Task, texts: Mapping[str, str]) -> tuple[str, str, str]:
    """The text before the truncated field, the field, and the text after it (all of it, if no field is truncated)."""
    literals = _literals(task.template)
    pieces, current = ["", "", ""], 0 if task.truncated else 2
    pieces[current] = literals[0]
    for name, literal in zip(task.fields, literals[1:], strict=True):
        text, literal = _end_once(texts[name], literal) if name in task.ends_once else (texts[name], literal)
        if name == task.truncated:
            pieces[1:], current = [text, literal], 2
        else:
            pieces[current] += text + literal
    return pieces[0], pieces[1], pieces[2]


@lru_cache
def _literals(template: str) -> tuple[str, ...]:
    """What stands before, between and after the fields."""
    literals = [""]
    for literal, name, _, _ in Formatter().parse(template):
        literals[-1] += literal
        if name is not None:
            literals.append("")
    return tuple(literals)


def _end_once(text: str, literal: str) -> tuple[str, str]:
    """A text that ends its own sentence takes the place of the template's mark, which is then `literal`'s first."""
    if text[-1] in SENTENCE_ENDS and literal[:1] and literal[0] in SENTENCE_ENDS:
        return text[:-1], text[-1] + literal[1:]
    return text, literal
