"""Markdown tables whose source can be read as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNKNOWN = "-"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """The first `words` columns stand left, the others right."""
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if place < words else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if place < words else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join([line(columns), line(rule), *(line(row) for row in rows)])


def span(figures: dict[str, float], form: str) -> str:
    """`lowest – highest`."""
    return f"{figures['min']:{form}} – {figures['max']:{form}}"


def shown(value: float | None, form: str, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{form}}{unit}"


def footer(raw: Any) -> list[str]:
    """Where the numbers come from: command, machine, versions."""
    about = raw["machine"]
    threads = ", ".join(f"{name} {value}" for name, value in raw["threads"].items() if value is not None)
    names = ("python", "torch", "transformers", "peft", "deepspeed")
    versions = ", ".join(f"{name} {raw['versions'][name]}" for name in names)
    return [
        f"Made by `{raw['command']}`, {raw['date']}, commit `{raw['git_commit']}`.",
        f"Machine: {about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, "
        f"{about['gpu'] or 'no GPU'}; threads: {threads}. {versions}.",
    ]
