"""What a run's predictions are worth: its clients' files, in order, by the metrics of its task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.data.templates import Task
from hpc.data.wording import task_of
from hpc.errors import DataError
from hpc.metrics.labels import parse_label, unparsed
from hpc.metrics.multirc import Answer
from hpc.metrics.table import LABELS, METRICS, MULTIRC, OF_LANGUAGE, RECORD, UNPARSED, Metrics, metrics_of
from hpc.predictions import predictions_path

Line = dict[str, Any]
# Field → what it may be.
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "kind": ("labels, candidates or text", lambda value: value in ("labels", "candidates", "text")),
    "choices": ("a list of texts, or null", lambda value: value is None or _texts(value)),
    "chosen": ("a whole number, or null", lambda value: value is None or type(value) is int),
    "decoded": ("a text, or null", lambda value: value is None or isinstance(value, str)),
    "right": ("a list of texts", lambda value: _texts(value)),
    "question": ("a text, or null", lambda value: value is None or isinstance(value, str)),
}


@dataclass(kw_only=True, frozen=True)
class Scored:
    """The examples of all clients at one moment of a run."""

    metrics: dict[str, float]
    """In percent; `unparsed` is a number of examples."""
    examples: int
    chosen: list[int | None]
    """What was chosen of each example's choices; none where a text was to be generated, or a decoded one is no choice.
    """
    digest: str
    """SHA-256 of all predictions: two runs with the same one predicted the same."""


def score_run(folder: Path, config: Config, step: int) -> Scored:
    """The predictions after `step` steps in a run's folder. Raises `DataError` for a file that is missing or broken."""
    lines = [line for client in range(config.train.clients) for line in read_lines(_file(folder, step, client))]
    return score(lines, config)


def score(lines: Sequence[Line], config: Config) -> Scored:
    """Lines of `hpc.predictions`, of all clients."""
    task = task_of(config.data)
    labels = any(line["kind"] == "labels" for line in lines)
    metrics = LABELS if labels and task.kind == "text" else metrics_of_task(task)  # `jsonl` in BoolQ's format
    decodes = config.data.evaluate_by == "generation"
    if (decodes or metrics in OF_LANGUAGE.values()) and any(line["decoded"] is None for line in lines):
        raise DataError("nothing was decoded, so there is no text to score; run with --data.evaluate_by generation")
    chosen = [_chosen(line, decodes=decodes) for line in lines]
    texts = [None if i is None else str(line["choices"][i]) for line, i in zip(lines, chosen, strict=True)]
    if metrics in OF_LANGUAGE.values():
        found = metrics.score([line["decoded"] for line in lines], [line["right"][0] for line in lines])
    elif metrics is MULTIRC:
        yes = task.verbalisers[0].strip()
        answers = [Answer(question=line["question"], correct=line["right"] == [yes]) for line in lines]
        found = metrics.score([None if text is None else text == yes for text in texts], answers)
    elif metrics is RECORD:  # any text has its share of words in common with the right one
        said = [line["decoded"] for line in lines] if decodes else texts
        found = {**metrics.score(said, [line["right"] for line in lines]), UNPARSED: unparsed(texts)}
    else:
        found = metrics.score(texts, [line["right"][0] for line in lines])
    answered = [[index, line["decoded"]] for line, index in zip(lines, chosen, strict=True)]
    digest = hashlib.sha256(json.dumps(answered, ensure_ascii=False).encode()).hexdigest()
    return Scored(metrics=found, examples=len(lines), chosen=chosen, digest=digest)


def metrics_of_task(task: Task) -> Metrics:
    """The task's metrics; a file of one's own with labels is scored as labels are."""
    if task.kind == "text":
        return metrics_of(task.name, task.language)
    return METRICS[task.name] if task.name in METRICS and task.name != "jsonl" else LABELS


def read_lines(path: Path) -> list[Line]:
    """Raises `DataError` with file, line and field."""
    try:
        texts = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")  # not at U+2028, which may be in a text
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"predictions cannot be read: {error}") from None
    return [_line(f"{path}, line {number}", text) for number, text in enumerate(texts, start=1)]


def _line(where: str, text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); evaluate the run again") from None
    if not isinstance(line, dict):
        raise DataError(f"{where}: no object with named fields; evaluate the run again")
    for name, (rule, holds) in FIELDS.items():
        if name not in line:
            raise DataError(f"{where}: no field {name!r}; evaluate the run again")
        if not holds(line[name]):
            raise DataError(f"{where}: field {name!r} is {line[name]!r:.40}, not {rule}; evaluate the run again")
    _check_choice(where, line)
    found: Line = line
    return found


def _check_choice(where: str, line: Line) -> None:
    text, choices, chosen = line["kind"] == "text", line["choices"], line["chosen"]
    if (choices is None) != text or (chosen is None) != text:
        raise DataError(f"{where}: fields 'choices' and 'chosen' do not fit 'kind' {line['kind']}; evaluate it again")
    if choices is not None and not 0 <= chosen < len(choices):
        raise DataError(f"{where}: field 'chosen' is {chosen}, and there are {len(choices)} choices; evaluate it again")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)


def _file(folder: Path, step: int, client: int) -> Path:
    """Of the client's own role, or of the uncut model's."""
    paths = [predictions_path(folder / "roles" / role, step, client) for role in (f"client-{client}", "centralised")]
    return next((path for path in paths if path.exists()), paths[0])


def _chosen(line: Line, *, decodes: bool) -> int | None:
    if line["choices"] is None:
        return None
    return parse_label(line["decoded"], line["choices"]) if decodes else line["chosen"]
