"""The one table of prompts and answers: what each task asks, and in which words it is answered. A new task is a row.

Prompts and verbalisers of the SuperGLUE tasks: FL-GLM (arXiv 2406.14898). `TemplateConfig` changes a row for one run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from string import Formatter
from typing import Literal

Kind = Literal["labels", "candidates", "text"]
Language = Literal["en", "zh"]


@dataclass(kw_only=True, frozen=True)
class Task:
    """How a flat record with named text fields becomes a prompt and its answer."""

    name: str
    template: str
    """Prompt with `{field}`s in it, each at most once."""
    answers: tuple[tuple[object, str], ...] = ()
    """Label in the record → verbaliser, with the space that parts it from the prompt."""
    answer: str | None = None
    """Instead: a text to generate, with `{field}`s; or, with `{entity}`, one of the record's own candidates."""
    truncated: str | None = None
    """The one field that may lose a part when the prompt is too long."""
    loses: Literal["end", "beginning"] = "end"
    """Which part that is: the one that matters less."""
    label_field: str = "label"
    group_field: str = "group"
    """Field of what must stay together on one client, where the publisher's format says nothing of it."""
    ends_once: tuple[str, ...] = ()
    """Fields whose own full stop or question mark takes the place of the template's."""
    may_be_empty: tuple[str, ...] = ()
    """Fields that are without text in some of the publisher's own records."""
    language: Language = "en"

    @property
    def kind(self) -> Kind:
        """`labels` and `candidates` are chosen by likelihood, `text` is generated."""
        if self.answers:
            return "labels"
        return "candidates" if self.answer_fields == (ENTITY,) else "text"

    @property
    def verbalisers(self) -> tuple[str, ...]:
        return tuple(verbaliser for _, verbaliser in self.answers)

    @property
    def fields(self) -> tuple[str, ...]:
        """Text fields that a record must have for its prompt."""
        return fields_in(self.template)

    @property
    def answer_fields(self) -> tuple[str, ...]:
        """Text fields that a record must have for its answer."""
        return fields_in(self.answer or "")


@lru_cache
def fields_in(template: str) -> tuple[str, ...]:
    return tuple(field for _, field, _, _ in Formatter().parse(template) if field)


ENTITY = "entity"
YES_NO = ((True, " Yes"), (False, " No"))
BY_HYPOTHESIS = '"{hypothesis}"? | [MASK], "{premise}"'

BOOLQ = Task(
    name="boolq",
    template="{passage}. Question: {question}? Answer:",
    answers=YES_NO,
    truncated="passage",
    ends_once=("passage", "question"),
)

TASKS = (
    BOOLQ,
    Task(
        name="cb",
        template=BY_HYPOTHESIS,
        answers=(("entailment", " Yes"), ("contradiction", " No"), ("neutral", " Maybe")),
        truncated="premise",
        loses="beginning",  # the clause in question is in a premise's last sentence
    ),
    Task(
        name="copa",
        template='Choice A: "{choice1}" or Choice B: "{choice2}" Premise: {premise} The {question} is',
        answers=((0, " A"), (1, " B")),
    ),
    Task(
        name="multirc",
        template='"{passage}" Question: {question} Is it answer "{answer}"?',
        answers=((1, " Yes"), (0, " No")),
        truncated="passage",
        may_be_empty=("answer",),
    ),
    Task(name="record", template="[{passage}][{query}]", answer=" {entity}", truncated="passage"),
    Task(
        name="rte",
        template=BY_HYPOTHESIS,
        answers=(("entailment", " Yes"), ("not_entailment", " No")),
        truncated="premise",
    ),
    Task(name="wic", template='"{sentence1}" / "{sentence2}" Similar sense of {word}?', answers=YES_NO),
    Task(
        name="wsc",
        template="[{text}] The pronoun '*{span2_text}*' refers to {span1_text}?",
        answers=YES_NO,
    ),
    Task(name="cnn_dailymail", template="{article}", answer="\n{highlights}", truncated="article"),
    Task(name="xsum", template="{document}", answer="\n{summary}", truncated="document"),
    Task(
        name="huatuo",
        template="{question}",
        answer="\n{answer}",
        truncated="question",
        loses="beginning",  # patients tell their story first and ask at the end
        language="zh",
    ),
    Task(name="jsonl", template="{prompt}", answer=" {answer}"),
)

# Value of --data.task → how its records are worded.
FORMATS: Mapping[str, Task] = {"ward_notes": BOOLQ, **{task.name: task for task in TASKS}}
