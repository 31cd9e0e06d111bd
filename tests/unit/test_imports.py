"""Imports go downwards only. Read from the source with `ast`, so nothing is imported and lazy imports count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "hpc"

# Module or package → floor. The longest fitting name decides; a module imports from its own floor and those below.
FLOORS = {
    "hpc.errors": 0,
    # pure: values, bytes and rules
    "hpc.config": 1,
    "hpc.topology": 1,
    "hpc.hostlist": 1,
    "hpc.files": 1,
    "hpc.placement": 1,
    "hpc.supervision": 1,
    "hpc.slurm_steps": 1,
    "hpc.schedule": 1,
    "hpc.acts": 1,
    "hpc.programs": 1,
    "hpc.rules": 1,
    "hpc.train_config": 1,
    "hpc.data_config": 1,
    "hpc.privacy_config": 1,
    "hpc.link.kinds": 1,
    "hpc.trunk_config": 1,
    "hpc.quantizer": 1,
    "hpc.ragged": 1,
    "hpc.stopwatch": 1,
    "hpc.quiet": 1,
    "hpc.undumped": 1,
    "hpc.logs": 1,
    "hpc.last_words": 1,
    "hpc.imports": 1,
    "hpc.agreement": 2,
    "hpc.link.frame": 1,
    "hpc.link.cipher": 1,
    "hpc.report.events": 1,
    "hpc.report.provenance": 1,
    # what roles are made of
    "hpc.link": 2,
    "hpc.source": 2,
    "hpc.model": 2,
    "hpc.data": 2,
    "hpc.metrics": 2,
    # roles, and what they do together
    "hpc.optim": 3,
    "hpc.learner": 3,
    "hpc.client_side": 3,
    "hpc.client_evaluation": 3,
    "hpc.fellows": 3,
    "hpc.client_step": 3,
    "hpc.contribution": 3,
    "hpc.trunk_link": 3,
    "hpc.early_stopping": 3,
    "hpc.smashed_cache": 3,
    "hpc.served": 3,
    "hpc.layouts": 3,
    "hpc.served_decoding": 3,
    "hpc.split_chain": 3,
    "hpc.matches": 3,
    "hpc.predictions": 3,
    "hpc.server_side": 3,
    "hpc.server_step": 3,
    "hpc.shared_step": 3,
    "hpc.replica_step": 3,
    "hpc.server_sum": 3,
    "hpc.replica_trunk": 3,
    "hpc.build_trunk": 3,
    "hpc.client": 3,
    "hpc.server": 3,
    "hpc.trunk": 3,
    "hpc.aggregate": 3,
    "hpc.centralised": 3,
    "hpc.checkpoint": 3,
    "hpc.extensions": 3,
    "hpc.trained": 3,
    "hpc.redeal": 3,
    "hpc.resume": 3,
    "hpc.saving": 3,
    "hpc.export": 3,
    "hpc.privacy.seen": 2,
    "hpc.privacy.recording": 3,
    "hpc.privacy.defences": 2,
    # what looks at runs
    "hpc.privacy": 4,
    "hpc.report": 4,
    # what starts them
    "hpc.privacy.attack_live": 5,
    "hpc.privacy.attack_run": 5,
    "hpc.privacy.attack_command": 5,
    "hpc.export.pick": 5,
    "hpc.export.command": 5,
    "hpc.baseline": 5,
    "hpc.bench": 5,
    "hpc.cli": 5,
    "hpc.doctor": 5,
    "hpc.dry_run": 5,
    "hpc.reproduce": 5,
    "hpc.federation": 5,
    "hpc.generate": 5,
    "hpc.joining": 5,
    "hpc.ask": 5,
    "hpc.wishes": 1,
    "hpc.stopping": 1,
    "hpc.admission": 3,
    "hpc.reception": 3,
    "hpc.opening": 5,
    "hpc.rendezvous": 5,
    "hpc.launcher": 5,
    "hpc.roles": 5,
    "hpc.nursery": 5,
    "hpc.nurslings": 5,
    "hpc.preflight": 5,
    "hpc.process": 5,
    "hpc.slurm_hosts": 5,
    "hpc.slurm_job": 5,
    "hpc.turns": 5,
}
# Submitting a job, or planning one, must not pay for importing torch.
NO_TORCH = {
    "hpc.errors",
    "hpc.config",
    "hpc.topology",
    "hpc.hostlist",
    "hpc.placement",
    "hpc.supervision",
    "hpc.slurm_steps",
    "hpc.schedule",
    "hpc.acts",
    "hpc.programs",
    "hpc.rules",
    "hpc.train_config",
    "hpc.privacy_config",
    "hpc.data_config",
    "hpc.link.kinds",
    "hpc.trunk_config",
    "hpc.quantizer",
    "hpc.logs",
    "hpc.undumped",
    "hpc.last_words",
    "hpc.stopping",
    "hpc.report.events",
    "hpc.report.provenance",
}
STRANGERS = [("hpc.client", "hpc.server"), ("hpc.server", "hpc.client")]


def modules() -> dict[str, Path]:
    """Dotted name → file; a package stands for its `__init__.py`."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]
    return {
        ".".join(("hpc", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in paths
    }


def imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports; `from a import b` gives `a.b`, as b may be a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} line {node.lineno}: import from hpc by its full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, root: str) -> bool:
    return name == root or name.startswith(root + ".")


def floor(module: str) -> int:
    fitting = [root for root in FLOORS if within(module, root)]
    assert fitting, f"{module} has no floor yet: place it in FLOORS in {Path(__file__).name}"
    return FLOORS[max(fitting, key=len)]


MODULES = modules()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_floor_and_below(module: str) -> None:
    own = floor(module)
    for name in imports(MODULES[module]):
        if within(name, "hpc") and name != "hpc.__version__":
            assert floor(name) <= own, f"{module} (floor {own}) imports {name} (floor {floor(name)})"


@pytest.mark.parametrize("module", [name for name, number in FLOORS.items() if number <= 1 and name in MODULES])
def test_pure_modules_know_nothing_of_processes(module: str) -> None:
    barred = "torch" if module in NO_TORCH else "torch.distributed"
    found = [name for name in imports(MODULES[module]) if within(name, barred)]
    assert not found, f"{module} imports {found}; it must not import {barred}"


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, "hpc.metrics")])
def test_metrics_know_values_only(module: str) -> None:
    """Predictions come as plain values, so old runs can be scored again without a model, or torch."""
    allowed = ("hpc.errors", "hpc.metrics")
    found = [name for name in imports(MODULES[module]) if name.split(".")[0] in {"hpc", "torch", "transformers"}]
    assert not [name for name in found if not any(within(name, root) for root in allowed)]


@pytest.mark.parametrize(("module", "stranger"), STRANGERS)
def test_client_and_server_do_not_know_each_other(module: str, stranger: str) -> None:
    assert not [name for name in imports(MODULES[module]) if within(name, stranger)]


@pytest.mark.parametrize("package", ["hpc", "hpc.link", "hpc.report"])
def test_packages_with_pure_modules_import_nothing_themselves(package: str) -> None:
    """Importing `hpc.link.frame` runs `hpc/link/__init__.py`: what that imports, the pure module would import."""
    path = PACKAGE.joinpath(*package.split(".")[1:], "__init__.py")
    found = [name for name in imports(path) if not within(name, "__future__")] if path.exists() else []
    assert not found, f"{path.relative_to(PACKAGE.parent)} imports {found}; import the modules where they are used"


def test_the_modules_were_found() -> None:
    assert {"hpc.errors", "hpc.config", "hpc.report", "hpc.report.events"} <= MODULES.keys()
