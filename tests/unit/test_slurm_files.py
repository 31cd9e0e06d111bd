"""The files in slurm/: what DeepSpeed is told passes our own checks, and scripts are shell that has no site in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hpc.config import Config, ModelConfig, TrunkConfig
from hpc.preflight import check
from hpc.trunk_config import read_deepspeed_json, zero_stage
from tests.runs import ROOT

SLURM = ROOT / "slurm"
STAGES = {"zero1": 1, "zero2": 2, "zero3": 3, "offload": 3, "a100_bf16": 2}
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sh"))


def test_every_deepspeed_file_is_known_here() -> None:
    assert {path.stem for path in (SLURM / "deepspeed").glob("*.json")} == STAGES.keys()


@pytest.mark.parametrize("name", STAGES)
def test_deepspeed_files_pass_the_checks(name: str) -> None:
    path = str(SLURM / "deepspeed" / f"{name}.json")
    assert zero_stage(read_deepspeed_json(path)) == STAGES[name]
    dtype = "bfloat16" if name == "a100_bf16" else "float32"
    check(Config(model=ModelConfig(name_or_path="tiny-llama", dtype=dtype), trunk=TrunkConfig(deepspeed=path)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_shell(name: str) -> None:
    done = subprocess.run(["bash", "-n", str(SLURM / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def outside_of_a_job(name: str, cwd: Path, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "HPC_"))}
    return subprocess.run(
        ["bash", str(SLURM / name), *arguments],
        cwd=cwd,
        env={**kept, **extra},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("name", ["train.sh", "hetjob.sh"])
def test_outside_of_a_job_one_line_says_so(name: str) -> None:
    done = outside_of_a_job(name, ROOT)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "SLURM_JOB_ID is not set" in line
    assert "sbatch slurm/train.sh" in line


def test_a_script_that_finds_no_repository_says_so(tmp_path: Path) -> None:
    done = outside_of_a_job("train.sh", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "HPC_ROOT" in line


def test_a_site_file_that_is_missing_is_named(tmp_path: Path) -> None:
    done = outside_of_a_job("train.sh", ROOT, HPC_SITE=str(tmp_path / "site.sh"))
    assert done.returncode == 2
    assert str(tmp_path / "site.sh") in done.stderr


def test_the_site_file_may_choose_the_python(tmp_path: Path) -> None:
    (tmp_path / "my site.sh").write_text("HPC_PYTHON=/no/such/python\n")
    done = outside_of_a_job("train.sh", ROOT, HPC_SITE=str(tmp_path / "my site.sh"))
    assert done.returncode == 2
    assert "/no/such/python" in done.stderr


def test_an_array_index_without_table_is_refused() -> None:
    done = outside_of_a_job("reproduce.sh", ROOT, SLURM_ARRAY_TASK_ID="17")
    assert done.returncode == 2
    assert "17" in done.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One with nothing but our scripts in it, and a Python that tells what it was given."""
    shutil.copytree(SLURM, tmp_path / "my repo" / "slurm")
    (tmp_path / "my repo" / "python").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (tmp_path / "my repo" / "python").chmod(0o755)
    return tmp_path / "my repo"


def test_an_index_stands_for_a_table(repository: Path) -> None:
    known = {"HPC_ROOT": str(repository), "HPC_PYTHON": str(repository / "python"), "SLURM_ARRAY_TASK_ID": "1"}
    missing = outside_of_a_job("reproduce.sh", repository.parent, **known)
    assert missing.returncode == 2
    (line,) = missing.stderr.splitlines()
    assert "launch/reproduce.py" in line
    (repository / "launch").mkdir()
    (repository / "launch" / "reproduce.py").touch()
    done = outside_of_a_job("reproduce.sh", repository.parent, **known)
    assert done.stdout == f"{repository}/launch/reproduce.py|table2|"


@pytest.mark.parametrize(
    ("name", "program"), [("train.sh", "on_slurm.py"), ("hetjob.sh", "on_slurm.py"), ("bench.sh", "bench.py")]
)
def test_scripts_run_their_program_with_the_flags(name: str, program: str, repository: Path) -> None:
    """From a folder within the repository, flags with spaces as they are."""
    known = {"SLURM_SUBMIT_DIR": str(repository / "slurm"), "HPC_PYTHON": str(repository / "python")}
    done = outside_of_a_job(name, repository.parent, "--a", "b c", **known)
    assert done.stdout == f"{repository}/launch/{program}|--a|b c|", done.stderr
