"""Runs of the real command line in real processes, each with a hard deadline, none left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LOCAL, TRAIN = str(ROOT / "launch" / "local.py"), str(ROOT / "launch" / "train.py")
EXPORT = str(ROOT / "launch" / "export.py")
JOIN = str(ROOT / "launch" / "join.py")
TINY = ["--config", str(ROOT / "launch" / "recipes" / "tiny.yaml"), "--data.val_examples", "8"]
# AdamW forgives any constant factor on a gradient; a large epsilon and a tight clip do not.
STEPS = ("--train.max_steps", "4", "--train.adam_epsilon", "0.01", "--train.max_grad_norm", "0.2")


@dataclass(kw_only=True)
class Finished:
    """What a command left."""

    code: int
    out: str
    err: str
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        assert self.code == 0, self.err[-3000:]
        found: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return found


def clean_environment(**extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    return {**kept, **extra}


def run_command(
    command: list[str], folder: Path, *, timeout_s: float = 100, env: dict[str, str] | None = None
) -> Finished:
    """Run to the end; past the deadline the whole process group is killed and the test fails."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env or clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(
            f"no end within {timeout_s} s: {' '.join(command)}\n{out[-1500:]}\n{err[-3000:]}"
        ) from None
    return Finished(code=process.returncode, out=out, err=err, folder=folder)


def local(
    folder: Path,
    keys_dir: Path,
    *arguments: str,
    launcher: tuple[str, ...] = (sys.executable,),
    timeout_s: float = 100,
) -> Finished:
    """`launch/local.py` on the tiny recipe."""
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(keys_dir), "--link.timeout_s", "60"]
    return run_command([*launcher, LOCAL, *TINY, *own, *arguments], folder, timeout_s=timeout_s)


def torchrun(processes: int) -> tuple[str, ...]:
    return (
        str(BIN / "torchrun"),
        "--nproc-per-node",
        str(processes),
        "--master-port",
        "0",
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )


class Started:
    """Commands that run at the same time, in process groups of their own; what is left of them dies at the end."""

    def __init__(self) -> None:
        self.all: dict[str, subprocess.Popen[str]] = {}
        self.ended_at: dict[str, float] = {}

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.all.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stderr is not None
            process.stderr.close()

    def start(self, name: str, command: list[str], **variables: str) -> None:
        self.all[name] = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean_environment(**variables),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait(self, timeout_s: float) -> dict[str, tuple[int, str]]:
        """Exit code and stderr of each, which must be short; `ended_at` has the time of each end."""
        deadline = time.monotonic() + timeout_s
        while len(self.ended_at) < len(self.all):
            for name, process in self.all.items():
                if name not in self.ended_at and process.poll() is not None:
                    self.ended_at[name] = time.monotonic()
            assert time.monotonic() < deadline, f"no end within {timeout_s} s; ended: {list(self.ended_at)}"
            time.sleep(0.02)
        return {name: (process.returncode, process.communicate()[1]) for name, process in self.all.items()}


def rank_of(pid: int, folder: Path) -> int | None:
    """The global rank of a process of the run in `folder`; None if it is none.

    From its environment, which only root may read of a role (hpc.undumped); else from what the logs say.
    """
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return next((int(entry[5:]) for entry in entries if entry.startswith(b"RANK=")), None)
    except PermissionError:
        logs = {path.stem: path.read_text() for path in (folder / "logs").glob("*.log")}
        trunk_ranks = sum(name.startswith("trunk-") for name in logs)
        name = next((name for name, text in logs.items() if f"started: pid {pid} on" in text), None)
        if name is None:
            return None
        role, _, index = name.partition("-")
        return int(index) + (trunk_ranks if role == "client" else 0)
