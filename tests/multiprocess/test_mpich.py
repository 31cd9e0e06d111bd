"""MPICH beside Open MPI: its mpirun brings its own library along, and the losses are those of the others.

MPICH is looked for where the Makefile puts it (mpich/ in the virtual environment), then in PATH as Debian calls it.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.runs import BIN, ROOT, STEPS, TINY, TRAIN, Finished, run_command

pytestmark = [pytest.mark.timeout(240), pytest.mark.mpi]


def mpich() -> str | None:
    """Its mpirun; None without."""
    prefixes = (ROOT / ".venv", Path(sys.prefix))
    beside = (str(prefix / "mpich" / "bin" / "mpirun") for prefix in prefixes)
    found = (shutil.which(name) for name in (*beside, "mpirun.mpich", "mpiexec.hydra"))
    return next((each for each in found if each), None)


@pytest.fixture
def launcher() -> str:
    found = mpich()
    if found is None:
        pytest.skip("no MPICH: make installs it, or Debian's package mpich")
    return found


def test_mpich_gives_the_same_bits(launcher: str, one_machine_run: Finished, run_keys: Path, tmp_path: Path) -> None:
    own = ["--run.output_dir", str(tmp_path / "o"), "--link.keys_dir", str(run_keys), "--link.timeout_s", "60"]
    command = [launcher, "-n", "3", str(BIN / "python"), TRAIN, *TINY, *STEPS, *own, "--link.transport", "mpi"]
    summary = run_command(command, tmp_path / "o").summary
    assert summary["transport"] == "mpi"
    assert summary["losses"] == one_machine_run.summary["losses"]


def test_each_process_is_a_rank_of_mpichs_world(launcher: str, tmp_path: Path) -> None:
    """Not the library that comes first in this environment, under which each would be alone."""
    program = (
        "import os, sys; from pathlib import Path;"
        "from hpc.link.mpi_library import use_launchers_library as use; use(); from mpi4py import MPI;"
        "told = f\"{MPI.COMM_WORLD.size} {'MPICH' in MPI.Get_library_version()}\";"
        "Path(sys.argv[1], os.environ['PMI_RANK']).write_text(told)"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MPI4PY_", "OMPI_"))} | {"PYTHONPATH": str(ROOT)}
    command = [launcher, "-n", "2", str(BIN / "python"), "-c", program, str(tmp_path)]
    finished = run_command(command, tmp_path, env=env)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 True", "2 True"], finished.err
