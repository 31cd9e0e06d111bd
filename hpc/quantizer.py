"""The library behind `trunk.quantization`: is it there? Imports neither it nor torch."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from hpc.errors import ConfigError

LIBRARY = "bitsandbytes"


def require_quantizer(kind: str) -> None:
    """Raise `ConfigError` if `trunk.quantization` is `kind` and the library that does it is not installed."""
    if kind != "none" and find_spec(LIBRARY) is None:
        raise ConfigError(
            f"--trunk.quantization {kind} needs the package {LIBRARY}, which is not installed; "
            f"run pip install -c constraints.txt {LIBRARY}, or use --trunk.quantization none"
        )


def leave_out_unless(kind: str) -> None:
    """Without quantisation, let nobody import the library: PEFT would, which costs a second of each process's start.

    To be called before PEFT is imported; `None` is how Python is told that a module is not there.
    """
    if kind == "none":
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
