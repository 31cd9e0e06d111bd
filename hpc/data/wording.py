"""A task worded as the configuration asks: its row of the table, with what `--data.template` says instead. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hpc.config import DataConfig, TemplateConfig
from hpc.data.templates import ENTITY, FORMATS, Task, fields_in
from hpc.data_config import spelt
from hpc.errors import ConfigError
from hpc.rules import require


def task_of(data: DataConfig) -> Task:
    """The task as this run words it. Raises `ConfigError` where `--data.template` does not fit the task."""
    task, template = FORMATS[data.task], data.template
    if template == TemplateConfig():
        return task
    changed = replace(
        task,
        template=template.prompt or task.template,
        label_field=template.label_field or task.label_field,
        group_field=template.group_field or task.group_field,
        language=template.language or task.language,
    )
    changed = _cut(_answered(changed, template), template.cut)
    require(
        template.label_field is None or changed.kind == "labels",
        f"--data.template.label_field {template.label_field}: {task.name} has no labels"
        + ("; say which there are with --data.template.verbalisers" if task.name == "jsonl" else ""),
    )
    return changed


def _answered(task: Task, template: TemplateConfig) -> Task:
    if template.verbalisers is not None:
        return _with_verbalisers(task, template.verbalisers)
    if template.answer is None:
        return task
    if task.kind == "labels":
        raise ConfigError(
            f"--data.template.answer {template.answer!r}: the answers of {task.name} are its labels'; change them with "
            "--data.template.verbalisers"
        )
    require(
        task.kind == "text" or fields_in(template.answer) == (ENTITY,),
        f"--data.template.answer {template.answer!r}: an answer of {task.name} is one of the record's entities; "
        f"write it with {{{ENTITY}}} and no other field",
    )
    return replace(task, answer=template.answer)


def _with_verbalisers(task: Task, verbalisers: Mapping[str, str]) -> Task:
    if task.name == "jsonl":
        return replace(task, answers=tuple(verbalisers.items()), answer=None)
    if task.kind != "labels":
        raise ConfigError(
            f"--data.template.verbalisers: {task.name} has no labels; change its answer with --data.template.answer"
        )
    labels = {spelt(label): label for label, _ in task.answers}
    require(
        labels.keys() == verbalisers.keys(),
        f"--data.template.verbalisers names the labels {', '.join(verbalisers)}; those of {task.name} are "
        f"{', '.join(labels)}",
    )
    return replace(task, answers=tuple((label, verbalisers[name]) for name, label in labels.items()))


def _cut(task: Task, cut: str | None) -> Task:
    if cut is None:
        return task if task.truncated in task.fields else replace(task, truncated=None)
    require(
        cut in task.fields,
        f"--data.template.cut {cut} is no field of the prompt {task.template!r}; name one of {', '.join(task.fields)}",
    )
    return task if cut == task.truncated else replace(task, truncated=cut, loses="end")
