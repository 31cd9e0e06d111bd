"""One nursery forks the roles of all runs here: each is a process of its own, but imports nothing anew."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc.launcher import child_environment
from hpc.link.identity import ensure_local
from hpc.nurslings import Nursery
from tests.runs import ROOT


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    command = [sys.executable, str(ROOT / "launch" / "nursery.py")]
    environ = {**child_environment(os.environ), "PYTHONPATH": str(ROOT)}
    found = Nursery(command, ROOT / "tests" / "faults" / "role.py", [], environ)
    try:
        yield found
    finally:
        found.close()


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 3)
    return folder
