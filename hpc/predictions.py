"""What a model made of one client's held-out examples, beside the right answers: for the metrics, in its own folder.

A line for each example, in its order: `kind`; `choices` and `chosen`, the index of the likeliest one (none for a text
to generate); `decoded`, the answer that was generated (none if nothing was); `right`, every right answer; `question`,
alike for the answers to one question of MultiRC. Texts have no white space around them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.data.dataset import ClientData
from hpc.data.tasks import Example

_log = logging.getLogger("hpc")


def predictions_path(folder: Path, step: int, client_id: int) -> Path:
    """The file in a role's folder."""
    return folder / f"predictions-{step}-client-{client_id}.jsonl"


def write_predictions(
    folder: Path, step: int, data: ClientData, chosen: Sequence[int], decoded: Sequence[str] | None
) -> None:
    """Write the file whole or not at all, readable by its owner only. A full disc costs the file, not the run."""
    path = predictions_path(folder, step, data.client_id)
    texts = decoded if decoded is not None else [None] * len(data.val)
    lines = [_line(*one) for one in zip(data.val, chosen, texts, strict=True)]
    unfinished = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "x", encoding="utf-8", opener=_for_its_owner) as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        unfinished.replace(path)
    except OSError as error:
        _log.warning("the predictions after step %d are lost: %s cannot be written (%s)", step, path, error)


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _line(example: Example, chosen: int, decoded: str | None) -> dict[str, Any]:
    text = example.kind == "text"
    return {
        "kind": example.kind,
        "choices": None if text else [choice.strip() for choice in example.choices],
        "chosen": None if text else chosen,
        "decoded": decoded,
        "right": [example.choices[index].strip() for index in example.right],
        "question": example.question,
    }
