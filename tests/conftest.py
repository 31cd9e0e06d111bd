"""Set before torch is loaded: the tests share two cores with the processes that they start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.runs import STEPS, Finished, local

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("LOCAL_RANK", "0")


@pytest.fixture(scope="session")
def pristine_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a server and three clients, made once; `keys_dir` is a copy that may be changed."""
    from hpc.link.identity import ensure_local

    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, clients=3)
    return folder


@pytest.fixture
def keys_dir(pristine_keys: Path, tmp_path: Path) -> Path:
    """A copy of the keys for one test."""
    return Path(shutil.copytree(pristine_keys, tmp_path / "keys"))


@pytest.fixture(scope="session")
def run_keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of a server and two clients, for runs of the real command line; not to be changed."""
    from hpc.link.identity import ensure_local

    folder = tmp_path_factory.mktemp("identities") / "keys"
    ensure_local(folder, 2)
    return folder


@pytest.fixture(scope="session")
def one_machine_run(tmp_path_factory: pytest.TempPathFactory, run_keys: Path) -> Finished:
    """client_batch over Gloo, one trunk rank, started by one python process: what all others must equal."""
    return local(tmp_path_factory.mktemp("reference"), run_keys, *STEPS, "--run.baseline_steps", "4")
