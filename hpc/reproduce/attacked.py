"""The attacks on a run of table 3, when it has ended: what goes into its committed file."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.cli import parse_class
from hpc.errors import ConfigError
from hpc.reproduce.plan import Job

if TYPE_CHECKING:
    from hpc.privacy.attack_config import AttackConfig

KEPT = ("options", "rows", "tokens", "shadow_rows", "steps", "seconds", "scores", "figures")
"""Of an attack's own file; the rest is the run's, and in its file already."""


def options_of(preset: str, job: Job) -> dict[str, AttackConfig]:
    """Name in the preset → the attack and its options. Raises `ConfigError` for an unknown method or option."""
    from hpc.privacy.attack_config import AttackConfig
    from hpc.privacy.attacks.registry import method_of
    from hpc.reproduce.run import as_flag

    found = {}
    for name, options in job.attacks.items():
        flags = [f"--attack.{key}={as_flag(value)}" for key, value in {"method": name, **options}.items()]
        try:
            found[name] = parse_class(AttackConfig, "attack", flags)
            method_of(found[name].method)
        except ConfigError as error:
            raise ConfigError(f"--preset {preset}: {error} (in attacks.methods.{name})") from None
    return found


def attacks_on(
    preset: str, job: Job, folder: Path, is_ended: Callable[[], bool] = lambda: False
) -> dict[str, Mapping[str, Any]]:
    """Name in the preset → what came of that attack, from the run's recordings.

    Raises `KeyboardInterrupt` behind the attack during which `is_ended` became true.
    """
    from hpc.privacy.attack_run import attack_runs

    options = options_of(preset, job)
    found: dict[str, Mapping[str, Any]] = {}
    for name, result in zip(options, attack_runs(folder, list(options.values())), strict=True):
        found[name] = {key: result.document()[key] for key in KEPT}
        if is_ended():
            raise KeyboardInterrupt(f"behind {name}")
    return found


def drop_recordings(folder: Path) -> None:
    """They hold the clients' text, and hundreds of runs' would fill a disc."""
    shutil.rmtree(folder / "recordings", ignore_errors=True)
