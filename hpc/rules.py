"""How a configuration value is refused."""

from __future__ import annotations

from hpc.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_at_least(name: str, value: float, low: float) -> None:
    require(value >= low, f"--{name} is {value}; it must be at least {low}")
