"""What a run's predictions are worth: its clients' files, in order, by the metrics of its task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.data.templates import Task
from hpc.data.wording import task_of
from hpc.errors import DataError
from hpc.metrics.labels import parse_label
from hpc.metrics.multirc import Answer
from hpc.metrics.table import LABELS, METRICS, MULTIRC, RECORD, Metrics, metrics_of
from hpc.predictions import predictions_path

Line = dict[str, Any]
KEYS = ("kind", "choices", "chosen", "decoded", "right", "question")


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
    metrics = metrics_of_task(task)
    decodes = config.data.evaluate_by == "generation"
    chosen = [_chosen(line, decodes=decodes) for line in lines]
    texts = [None if i is None else str(line["choices"][i]) for line, i in zip(lines, chosen, strict=True)]
    if task.kind == "text":
        found = metrics.score([line["decoded"] or "" for line in lines], [line["right"][0] for line in lines])
    elif metrics is MULTIRC:
        yes = task.verbalisers[0].strip()
        answers = [Answer(question=line["question"], correct=line["right"] == [yes]) for line in lines]
        found = metrics.score([None if text is None else text == yes for text in texts], answers)
    else:
        found = metrics.score(texts, [line["right"] if metrics is RECORD else line["right"][0] for line in lines])
    said = [[index, line["decoded"]] for line, index in zip(lines, chosen, strict=True)]
    digest = hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()
    return Scored(metrics=found, examples=len(lines), chosen=chosen, digest=digest)


def metrics_of_task(task: Task) -> Metrics:
    """The task's metrics; a file of one's own with labels is scored as labels are."""
    if task.kind == "text":
        return metrics_of(task.name, task.language)
    return METRICS[task.name] if task.name in METRICS and task.name != "jsonl" else LABELS


def read_lines(path: Path) -> list[Line]:
    """Raises `DataError` with file, line and field."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"predictions cannot be read: {error}") from None
    return [_line(f"{path}, line {number}", text) for number, text in enumerate(texts, start=1)]


def _line(where: str, text: str) -> Line:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); evaluate the run again") from None
    missing = [key for key in KEYS if not isinstance(line, dict) or key not in line]
    if missing:
        raise DataError(f"{where}: no field {missing[0]!r}; evaluate the run again")
    found: Line = line
    return found


def _file(folder: Path, step: int, client: int) -> Path:
    """Of the client's own role, or of the uncut model's."""
    paths = [predictions_path(folder / "roles" / role, step, client) for role in (f"client-{client}", "centralised")]
    return next((path for path in paths if path.exists()), paths[0])


def _chosen(line: Line, *, decodes: bool) -> int | None:
    if line["choices"] is None:
        return None
    return parse_label(line["decoded"] or "", line["choices"]) if decodes else line["chosen"]
