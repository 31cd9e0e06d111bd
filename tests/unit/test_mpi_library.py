"""A rank loads the MPI library of the launcher that started it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hpc.link import mpi_library
from hpc.link.mpi_library import ancestors, library_of, use_launchers_library


def installed(prefix: Path, library: str) -> Path:
    """An MPI of the MPICH family: its proxy's path."""
    for path in (prefix / "bin" / "hydra_pmi_proxy", prefix / library):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return prefix / "bin" / "hydra_pmi_proxy"


LAYOUTS = ["lib/libmpi.so.12", "lib/release/libmpi.so.12", "lib/x86_64-linux-gnu/libmpich.so.12"]


@pytest.mark.parametrize("library", LAYOUTS)
def test_the_library_is_found_beside_the_launcher(library: str, tmp_path: Path) -> None:
    assert library_of(installed(tmp_path, library)) == tmp_path / library


def test_no_library_beside_the_launcher(tmp_path: Path) -> None:
    assert library_of(tmp_path / "bin" / "hydra_pmi_proxy") is None


def test_the_programs_above_this_process() -> None:
    found = list(ancestors(os.getpid()))
    assert found[0] == Path(sys.executable).resolve()
    assert len(found) > 1


@pytest.mark.parametrize(
    ("environ", "chosen"),
    [
        ({"PMI_RANK": "0"}, True),
        ({"PMI_RANK": "0", "OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"PMI_RANK": "0", "MPI4PY_LIBMPI": "/mine"}, False),
        ({"PMI_RANK": "0", "MPI4PY_MPIABI": "mpich"}, False),
        ({}, False),
    ],
)
def test_only_hydras_ranks_are_told(
    environ: dict[str, str], chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = installed(tmp_path, LAYOUTS[0])
    monkeypatch.setattr(mpi_library, "ancestors", lambda pid: iter([Path("/bin/sh"), proxy, Path("/usr/bin/mpirun")]))
    before = dict(environ)
    use_launchers_library(environ)
    assert environ == ({**before, "MPI4PY_LIBMPI": str(tmp_path / LAYOUTS[0])} if chosen else before)


def test_a_resource_manager_without_hydra_leaves_the_choice_to_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mpi_library, "ancestors", lambda pid: iter([Path("/usr/sbin/slurmstepd")]))
    environ = {"PMI_RANK": "0"}
    use_launchers_library(environ)
    assert environ == {"PMI_RANK": "0"}
