"""All checks, and what they found as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hpc.doctor import files, machine, mpi, network, slurm, software
from hpc.doctor.finding import Asked, Check, Finding, Status, examine

CHECKS: dict[str, Check] = {
    "python": software.python,
    "libraries": software.libraries,
    "torch": software.torch,
    "gpus": software.gpus,
    "operator": software.operator,
    "memory": machine.memory,
    "limits": machine.limits,
    "cipher": machine.cipher,
    "keys": files.keys,
    "model": files.model,
    "output": files.output,
    "clock": files.clock,
    "ports": network.ports,
    "reach": network.reach,
    "mpi": mpi.mpi,
    "slurm": slurm.slurm,
}
ALONE = ("cipher",)
STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}
WIDEST = 140


def visit(asked: Asked, only: list[str] | None = None) -> dict[str, Finding]:
    """Run the checks, or only some of them."""
    chosen = {name: check for name, check in CHECKS.items() if only is None or name in only}
    return examine(chosen, asked, alone=ALONE)


def broken(found: Mapping[str, Finding]) -> bool:
    """Whether a run with this configuration would not work."""
    return any(finding.status == "fail" for finding in found.values())


def to_json(found: Mapping[str, Finding]) -> str:
    checks = [{"check": name, **asdict(finding)} for name, finding in found.items()]
    return json.dumps({"status": _worst(found), "checks": checks}, indent=1)


def print_table(found: Mapping[str, Finding], console: Console | None = None) -> None:
    """A row each, with the cure under what is wrong, and a last line that counts."""
    console = console or Console(highlight=False)
    console.width = min(console.width, WIDEST)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for name, finding in found.items():
        words = Text(finding.found)
        if finding.cure:
            words.append(f"\n→ {finding.cure}", style=STYLES[finding.status])
        table.add_row(name, Text(finding.status, style=STYLES[finding.status]), words)
    console.print(table)
    console.print()
    console.print(_verdict(found))


def _worst(found: Mapping[str, Finding]) -> Status:
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((finding.status for finding in found.values()), key=order.index, default="ok")


def _verdict(found: Mapping[str, Finding]) -> str:
    named: dict[Status, list[str]] = {"ok": [], "warn": [], "fail": []}
    for name, finding in found.items():
        named[finding.status].append(name)
    if named["fail"]:
        return f"A run with this configuration would not work: mend {', '.join(named['fail'])}."
    if named["warn"]:
        return f"Ready to run; worth a look: {', '.join(named['warn'])}."
    return "Ready to run."
