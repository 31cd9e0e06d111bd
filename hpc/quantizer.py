"""The library behind `trunk.quantization`: is it there? Imports neither it nor torch."""

from __future__ import annotations

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
