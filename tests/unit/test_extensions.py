"""A process that was killed while it built an operator must not make all later ones wait."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hpc import extensions
from hpc.errors import HpcError
from hpc.extensions import _only_one, load_operator

HOLD = "import sys, time; from pathlib import Path; from hpc.extensions import _only_one\n"
HOLD += "with _only_one(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    """Another process that builds."""
    root = Path(extensions.__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_builder_that_was_killed_leaves_nothing_behind(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with _only_one(tmp_path):
        pass


def test_the_wait_for_another_builder_ends(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extensions, "PATIENCE_S", 0.3)
    try:
        with pytest.raises(HpcError, match="another process has been building"), _only_one(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()


def test_a_stale_baton_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the real folder, with the real operator: without this the load would never return."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    load_operator()
    import os

    from deepspeed.ops.op_builder.builder import OpBuilder

    folder = Path(os.environ[extensions.FOLDER])
    (built,) = (
        folder.glob("*/deepspeed_shm_comm*")
        if not list(folder.glob("deepspeed_shm_comm*"))
        else [next(folder.glob("deepspeed_shm_comm*"))]
    )
    (built / "lock").touch()
    loaded = OpBuilder._loaded_ops.pop("deepspeed_shm_comm")
    try:
        load_operator()
        assert not (built / "lock").exists()
        assert "deepspeed_shm_comm" in OpBuilder._loaded_ops
    finally:
        OpBuilder._loaded_ops.setdefault("deepspeed_shm_comm", loaded)
