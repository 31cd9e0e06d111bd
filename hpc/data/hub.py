"""Data sets that the library `datasets` finds by name. It is optional, and imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hpc.errors import DataError

# Task → configuration of the data set, where its name alone does not say it.
CONFIGS = {
    **{task: task for task in ("boolq", "cb", "copa", "multirc", "record", "rte", "wic")},
    "wsc": "wsc.fixed",
    "cnn_dailymail": "3.0.0",
}
SPLITS = {"train": "train", "val": "validation"}
# Task → labels in the publisher's files, in the order of the library's numbers.
LABELS: Mapping[str, Sequence[object]] = {
    **dict.fromkeys(("boolq", "wic", "wsc"), (False, True)),
    "cb": ("entailment", "contradiction", "neutral"),
    "rte": ("entailment", "not_entailment"),
}


def hub_records(task: str, name: str, config: str | None, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and record of each row, labels as in the publisher's files.

    Raises `DataError` if the library is not installed, or cannot give the split (offline, no such name).
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(
            f"--data.hub_name {name} needs the library datasets, which is not installed; pip install datasets, or give "
            "files with --data.data_dir"
        ) from None
    config, split = config or CONFIGS.get(task), SPLITS[split]
    try:
        rows = load_dataset(name, config, split=split)
    except Exception as error:  # the library's own, of the network, of the file system: none is ours
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(
            f"--data.hub_name {name} (configuration {config}, split {split}) cannot be loaded: {told:.200}; check the "
            "name and the network, or give files with --data.data_dir"
        ) from None
    for number, row in enumerate(rows):
        yield f"{name} {split} row {number}", _published(task, dict(row))


def _published(task: str, record: dict[str, Any]) -> dict[str, Any]:
    labels, value = LABELS.get(task), record.get("label")
    if labels is not None and type(value) is int and 0 <= value < len(labels):
        record["label"] = labels[value]
    return record
