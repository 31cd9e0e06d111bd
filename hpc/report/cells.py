"""How the closing tables show figures: counts, sizes, shares, and a dash for what is not known."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

UNKNOWN = "-"
MANY_CLIENTS = 8  # more than these do not get a row each


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def table_of(title: str, *columns: str, words: int = 1) -> Table:
    """The first `words` columns hold words and stand left, the others numbers and stand right."""
    table = Table(title=title, title_justify="left", title_style="bold cyan", box=box.SIMPLE_HEAD)
    table.show_edge = False
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < words else "right", no_wrap=number < words)
    return table


def size(number: float | None) -> str:
    """Bytes in the largest unit of 1024 that leaves at least 1, e.g. `2.25 MiB`."""
    if number is None:
        return UNKNOWN
    power = min(4, int(math.log(number, 1024))) if number >= 1 else 0
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{number:.0f} B" if power == 0 else f"{number / 1024**power:.2f} {unit}"


def percent(value: float | None) -> str:
    return figure(None if value is None else value * 100, ".1f", " %")


def figure(value: float | None, form: str, unit: str = "") -> str:
    return UNKNOWN if value is None else f"{value:{form}}{unit}"
