"""Processes that hold keys leave no core file and are closed to other users; MPI's ranks must still share memory."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAY = (
    "import ctypes, resource\n"
    "def say(): print(resource.getrlimit(resource.RLIMIT_CORE), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)\n"
)
ROLE = """
from hpc.config import Config, RunConfig
from hpc.process import prepare_process
from hpc.topology import Place, World
for launcher in ("mpi", "torchrun"):
    world = World(launcher=launcher, global_rank=1, world_size=3, local_rank=0, master_addr="", master_port=0)
    prepare_process(Config(run=RunConfig(device="cpu", threads=1)), Place(role="client", index=0, world=world))
    say()
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SAY + code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_role_hides_its_memory() -> None:
    under_mpi, else_ = python(ROLE).splitlines()
    assert under_mpi == "(0, 0) 1", "its shared memory needs it"
    assert else_ == "(0, 0) 0"


def test_what_a_process_starts_cannot_dump_either() -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SAY + 'say()'!r}], check=True)"
    assert python(f"from hpc.undumped import leave_no_core; leave_no_core(); {child}").split(") ")[0] == "(0, 0"


def test_a_crash_leaves_nothing(tmp_path: Path) -> None:
    """With a soft limit raised as far as it goes before."""
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        pytest.skip("this machine allows no core files at all")
    crash = (
        f"import os, resource; resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
        f"os.chdir({str(tmp_path)!r})\n"
        "import sys; sys.path.insert(0, sys.argv[1]); from hpc.undumped import hide_memory\n"
        "hide_memory(shares_memory=False); os.abort()"
    )
    done = subprocess.run([sys.executable, "-c", crash, str(ROOT)], capture_output=True, timeout=60, check=False)
    assert done.returncode == -6
    assert not list(tmp_path.iterdir())


def test_every_program_begins_with_it() -> None:
    """Through `run_main`, or by itself."""
    for path in (ROOT / "launch").glob("*.py"):
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert {"run_main", "hide_memory"} & {*calls}, f"{path.name} neither calls run_main nor hides its memory"
