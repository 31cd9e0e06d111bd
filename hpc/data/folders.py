"""Where a task's file is in a folder: the publishers' layouts, tried in turn."""

from __future__ import annotations

from pathlib import Path

from hpc.errors import DataError

# Task → folders in `data_dir` that may hold its train.jsonl and val.jsonl, after the data sets' own names.
SUPERGLUE = {
    "boolq": "BoolQ",
    "cb": "CB",
    "copa": "COPA",
    "multirc": "MultiRC",
    "record": "ReCoRD",
    "rte": "RTE",
    "wic": "WiC",
    "wsc": "WSC",
}
FOLDERS = {task: (f"superglue/{name}", name) for task, name in SUPERGLUE.items()} | {
    task: (task,) for task in ("cnn_dailymail", "xsum", "huatuo")
}
LISTED = 12


def file_in(folder: Path, task: str, split: str) -> Path:
    """The file of one split. Raises `DataError` that lists what was looked for, and what there is."""
    wanted = [folder / name / f"{split}.jsonl" for name in FOLDERS.get(task, ())] + [folder / f"{split}.jsonl"]
    for path in wanted:
        if path.is_file():
            return path
    looked = ", ".join(str(path.relative_to(folder)) for path in wanted)
    hint = "" if split == "train" else "; for no evaluation give --data.val_examples 0"
    raise DataError(
        f"{folder} (--data.data_dir) has no {split}.jsonl of {task}: looked for {looked}; {content_of(folder)}{hint}"
    )


def content_of(folder: Path) -> str:
    """What there is instead, for a message."""
    try:
        names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    except OSError as error:
        return f"it cannot be listed: {error.strerror}"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"it holds {', '.join(names[:LISTED])}{more}" if names else "it is empty"
