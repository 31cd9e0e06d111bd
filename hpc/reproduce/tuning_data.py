"""A part of the training data to learn from, and the rest to choose a learning rate by."""

from __future__ import annotations

from pathlib import Path

from hpc.errors import DataError
from hpc.files import drafted

HELD_OUT = 5
"""Every fifth record chooses; the others teach."""


def divide(source: Path, target: Path) -> Path:
    """`train.jsonl` and `val.jsonl` in `target`, both from `source`'s `train.jsonl`; returns `target`."""
    path = source / "train.jsonl"
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if len(lines) < HELD_OUT:
        raise DataError(f"{path} has {len(lines)} records; a learning rate is chosen on at least {HELD_OUT}")
    parts = {"val": lines[::HELD_OUT], "train": [line for n, line in enumerate(lines) if n % HELD_OUT]}
    for name, part in parts.items():
        with drafted(target / f"{name}.jsonl") as draft:
            draft.write_text("".join(line + "\n" for line in part), encoding="utf-8")
    return target
