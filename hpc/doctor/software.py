"""Python, the libraries, and whether torch sees what the configuration asks for."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from hpc.doctor.finding import Asked, Finding, fail, ok, warn
from hpc.report.provenance import LIBRARIES

OLDEST, TOO_NEW = (3, 10), (3, 13)  # as setup.cfg has it
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"
INSTALL = "run make, or pip install -c constraints.txt -e ."


def python(asked: Asked) -> Finding:
    """The version, and which interpreter answers."""
    found = f"{platform.python_version()} at {sys.executable}"
    if OLDEST <= sys.version_info[:2] < TOO_NEW:
        return ok(found)
    return fail(found, "use Python 3.10 to 3.12")


def libraries(asked: Asked) -> Finding:
    """All there, in the versions that everything was tested with."""
    have = {name: _version(name) for name in LIBRARIES}
    missing = [name for name, version in have.items() if version is None]
    if missing:
        return fail(f"not installed: {', '.join(missing)}", INSTALL)
    pinned = pins(CONSTRAINTS.read_text() if CONSTRAINTS.exists() else "")
    other = [f"{name} {have[name]} ({pinned[name]})" for name in have if name in pinned and have[name] != pinned[name]]
    if other:
        return warn(f"other versions than the tested ones: {', '.join(other)}", INSTALL)
    return ok(", ".join(f"{name} {version}" for name, version in have.items() if name != "torch"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution).partition("+")[0]  # +cpu, +cu128: the same version
    except metadata.PackageNotFoundError:
        return None


def pins(text: str) -> dict[str, str]:
    """Name → version of a constraints file, for this Python."""
    found = {}
    for line in text.splitlines():
        match = re.match(r"([\w.-]+)==([\w.]+)(?:;\s*python_version\s*(>=|<)\s*\"(\d+)\.(\d+)\")?", line)
        if match is None:
            continue
        name, version, relation, *than = match.groups()
        newer = relation is None or (sys.version_info[:2] >= tuple(map(int, than))) == (relation == ">=")
        if newer:
            found[name] = version
    return found


def torch(asked: Asked) -> Finding:
    """It loads and computes; how many threads it would take."""
    import torch as library

    library.ones(2, 2) @ library.ones(2, 2)
    threads = asked.config.run.threads or len(os.sched_getaffinity(0))
    return ok(f"{library.__version__}, {threads} CPU threads of {os.cpu_count()}")


def gpus(asked: Asked) -> Finding:
    """Which GPUs torch sees, with NCCL; a fault only if the configuration asks for one."""
    import torch as library

    wanted = asked.config.run.device
    if library.cuda.is_available():
        count = library.cuda.device_count()
        names = [f"{library.cuda.get_device_name(each)} {_gib(library, each)} GiB" for each in range(count)]
        if not library.distributed.is_nccl_available():
            return warn(f"{', '.join(names)}, without NCCL", "links go over Gloo; install a torch with NCCL")
        version = ".".join(map(str, library.cuda.nccl.version()))
        return ok(f"{', '.join(names)}; NCCL {version}, CUDA {library.version.cuda}")
    built = "was built without CUDA" if library.version.cuda is None else "finds no driver or no device"
    if wanted == "cuda":
        return fail(f"none: this torch {built}", "install torch with CUDA and its driver, or use --run.device auto")
    if shutil.which("nvidia-smi") and wanted == "auto":
        return warn(f"nvidia-smi is here, but this torch {built}", "install a torch with CUDA to use the GPU")
    return ok(f"none (this torch {built}); not needed with --run.device {wanted}")


def _gib(library: object, device: int) -> int:
    return round(library.cuda.get_device_properties(device).total_memory / 2**30)  # type: ignore[attr-defined]


def operator(asked: Asked) -> Finding:
    """DeepSpeed's compiled operator: built already, or a compiler and ninja to build it with."""
    from hpc.extensions import FOLDER, operator_folder

    folder = operator_folder()
    built = sorted(folder.rglob("*.so"))
    if built:
        return ok(f"built: {built[0].name} in {folder}")
    compiler = shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")
    ninja = shutil.which("ninja") or shutil.which(str(Path(sys.executable).with_name("ninja")))
    if compiler is None or ninja is None:
        lacks = " and ".join(name for name, there in (("a C++ compiler", compiler), ("ninja", ninja)) if there is None)
        return warn(
            f"not built in {folder}, and {lacks} is missing",
            f"install it (apt install g++ ninja-build, or a module), or set {FOLDER} to a folder where it is built",
        )
    return ok(f"not built yet; the first run does, in a minute or two, with {compiler}")
