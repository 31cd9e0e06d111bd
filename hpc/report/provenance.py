"""Where numbers come from: versions, machine, commit, peak memory. Imports none of the libraries it names."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "cryptography", "pycryptodome", "mpi4py")


def versions() -> dict[str, str | None]:
    """Python and the libraries that decide numbers; None: not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """Kind of machine, without its name: `cpu`, `cores`, `memory_gib`, `gpu` (None: none, or torch was never asked)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": _cores(), "memory_gib": round(memory / 2**30, 1), "gpu": _gpu()}


def _cores() -> int:
    """Cores this process may use, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _gpu() -> str | None:
    """The GPU's name if this process has CUDA up already; asking otherwise would start CUDA for the sake of a label."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return str(torch.cuda.get_device_name())


def peak_rss_mib() -> float:
    """Peak resident memory of this process (MiB).

    VmHWM, because getrusage's figure survives exec: a role started by a large launcher would report the launcher's.
    Of a forked role (`hpc.nursery`) it counts the pages that it shares with its siblings, but not those of libraries'
    files that only their import touched, some 60 MiB: with HPC_NURSERY=0 it is what the role takes on a machine of its
    own.
    """
    field = _proc_field("/proc/self/status", "VmHWM")
    kib = float(field.split()[0]) if field else float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return kib / 1024


def _proc_field(path: str, name: str) -> str | None:
    """First `name: value` of a /proc file; None where there is no such file or field."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def git_commit() -> str | None:
    """Commit of the checkout this package lies in, with "+dirty" behind it if files differ; None outside a checkout."""
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None
    return commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's checkout (a virtual environment): then there is no answer.
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def without_folders(text: str) -> str:
    """An absolute path, also behind `--flag=`, as seen from here, or its last part: which folders this machine has is
    nobody's business.
    """
    flag, equals, value = text.rpartition("=") if text.startswith("--") else ("", "", text)
    path = Path(value)
    if not path.is_absolute():
        return text
    here = Path.cwd()
    return flag + equals + (str(path.relative_to(here)) if path.is_relative_to(here) else path.name)
