"""The cells of any of a preset's tables; table 3 is planned in another way than the others. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from hpc.errors import ConfigError
from hpc.reproduce.attack_plan import TABLE, attack_cells, attack_jobs
from hpc.reproduce.plan import Cell, cells_of
from hpc.reproduce.preset import Preset


def every_table(preset: Preset) -> list[str]:
    """Those that the preset has, in the paper's order."""
    return sorted([*preset.tables, *([TABLE] if preset.attacks else [])])


def table_cells(preset: Preset, tables: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Of some tables. `tasks`, `seeds`: only these; none: all that the preset has.

    Raises `ConfigError` for a table that the preset does not have, or a task that none of these tables has.
    """
    plain = [table for table in tables if table != TABLE]
    of_plain = [task for table in plain for block in preset.tables.get(table, ()) for task in block.tasks]
    of_attacks = list(preset.attacks.tasks) if preset.attacks and TABLE in tables else []
    known = list(dict.fromkeys([*of_plain, *of_attacks]))
    if known and (unknown := [task for task in tasks if task not in known]):
        raise ConfigError(f"--tasks {unknown[0]} is not in {', '.join(tables)}; choose of {', '.join(known)}")
    own = [task for task in tasks if task in of_plain]
    theirs = [task for task in tasks if task in of_attacks]
    cells = cells_of(preset, plain, own, seeds) if plain and (own or not tasks) else []
    if TABLE in tables and (theirs or not tasks):
        cells += attack_cells(attack_jobs(preset, theirs, seeds))
    return cells
