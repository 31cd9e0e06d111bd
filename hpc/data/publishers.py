"""The publishers' own formats: nested records → flat ones, one for each question that is asked.

SuperGLUE's MultiRC has all questions and answers of a passage in one record, ReCoRD all queries, WSC its spans in a
record of their own. The library `datasets` has them flat already; both forms are understood.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hpc.errors import DataError

Record = Mapping[str, Any]

PLACEHOLDER, MASK = "@placeholder", "[MASK]"


@dataclass(kw_only=True, frozen=True)
class FlatRecord:
    """One question with all that is needed to ask it."""

    where: str
    """File and line, and the place in the record."""
    fields: Record
    group: str | None = None
    """What it must share a client with, where the format says so: the passage."""
    question: str | None = None
    """MultiRC: the question that this is one answer to, unlike that of every other question."""
    candidates: tuple[str, ...] = ()
    """ReCoRD: the entities that may be the answer, each once."""
    right: tuple[str, ...] = field(default=())
    """ReCoRD: those that are."""


def flatten(task: str, record: Record, where: str) -> Iterator[FlatRecord]:
    """The questions in one record of a task. Raises `DataError` naming `where` and the field at fault."""
    return FLATTEN.get(task, _as_it_is)(record, where)


def member(record: Record, name: str, kind: type, where: str) -> Any:
    """A field of a record. Raises `DataError` if it is not there, or of another type."""
    if name not in record:
        raise DataError(f"{where}: no field {name!r}; the record has {', '.join(map(repr, record)) or 'none'}")
    value = record[name]
    # True is an int in Python, but no position in a text.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        expected = {str: "text", dict: "an object", list: "a list", int: "a whole number"}[kind]
        raise DataError(f"{where}: field {name!r} must be {expected}, not {type(value).__name__} ({value!r:.40})")
    return value


def _as_it_is(record: Record, where: str) -> Iterator[FlatRecord]:
    yield FlatRecord(where=where, fields=record)


def _wsc(record: Record, where: str) -> Iterator[FlatRecord]:
    spans = record if "span1_text" in record else member(record, "target", dict, where)
    named = {name: member(spans, name, str, where) for name in ("span1_text", "span2_text")}
    yield FlatRecord(where=where, fields={**record, **named})


def _multirc(record: Record, where: str) -> Iterator[FlatRecord]:
    if "paragraph" in record:
        text, number = member(record, "paragraph", str, where), member(record, "idx", dict, where).get("question")
        yield FlatRecord(where=where, fields={**record, "passage": text}, group=text, question=_question(text, number))
        return
    passage = member(record, "passage", dict, where)
    text = member(passage, "text", str, where).strip()  # once, so that all its questions share it
    for q, question in enumerate(_objects(passage, "questions", where)):
        at = f"{where}, question {q}"
        asked, key = member(question, "question", str, at), _question(text, question.get("idx", q))
        for a, answer in enumerate(_objects(question, "answers", at)):
            fields = {"passage": text, "question": asked, "answer": member(answer, "text", str, f"{at}, answer {a}")}
            if "label" in answer:
                fields["label"] = answer["label"]
            yield FlatRecord(where=f"{at}, answer {a}", fields=fields, group=text, question=key)


def _question(passage: str, number: object) -> str:
    return f"{hashlib.sha256(passage.encode()).hexdigest()[:16]}/{number}"


def _record(record: Record, where: str) -> Iterator[FlatRecord]:
    if "query" in record:
        text = member(record, "passage", str, where)
        entities, answers = (_texts(record, name, where) for name in ("entities", "answers"))
        yield _query(text, record, entities, answers, where)
        return
    passage = member(record, "passage", dict, where)
    text = member(passage, "text", str, where)
    entities = [_span(text, entity, where) for entity in _objects(passage, "entities", where)]
    for q, query in enumerate(_objects(record, "qas", where)):
        at = f"{where}, query {q}"
        answers = [member(answer, "text", str, at) for answer in _objects(query, "answers", at)]
        yield _query(text, query, entities, answers, at)


def _query(text: str, query: Record, entities: list[str], answers: list[str], where: str) -> FlatRecord:
    asked = member(query, "query", str, where)
    if PLACEHOLDER not in asked:
        raise DataError(f"{where}: field 'query' has no {PLACEHOLDER} ({asked!r:.60})")
    candidates, right = tuple(dict.fromkeys(entities)), tuple(dict.fromkeys(answers))
    if not right or not set(right) <= set(candidates):
        wrong = next((answer for answer in right if answer not in candidates), "")
        raise DataError(
            f"{where}: field 'answers' has {f'{wrong!r:.40}' if right else 'nothing'}; it must name one or more of the "
            f"passage's entities: {', '.join(candidates)[:200]}"
        )
    fields = {"passage": text, "query": asked.replace(PLACEHOLDER, MASK)}
    return FlatRecord(where=where, fields=fields, group=text, candidates=candidates, right=right)


def _span(text: str, entity: Record, where: str) -> str:
    """The text of an entity, whose end is its last letter."""
    start, end = (member(entity, name, int, where) for name in ("start", "end"))
    if not 0 <= start <= end < len(text):
        raise DataError(f"{where}: field 'entities' has letters {start} to {end} of a passage of {len(text)}")
    return text[start : end + 1].strip()


def _objects(record: Record, name: str, where: str) -> list[dict[str, Any]]:
    values = member(record, name, list, where)
    if not values or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{where}: field {name!r} must be a list of objects, and not empty")
    return list(values)


def _texts(record: Record, name: str, where: str) -> list[str]:
    values = member(record, name, list, where)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{where}: field {name!r} must be a list of texts")
    return [value.strip() for value in values]


FLATTEN: Mapping[str, Callable[[Record, str], Iterator[FlatRecord]]] = {
    "wsc": _wsc,
    "multirc": _multirc,
    "record": _record,
}
