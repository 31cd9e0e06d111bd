"""The attacks on a run of table 3, when it has ended: what goes into its committed file."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
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


def attacks_on(preset: str, job: Job, folder: Path) -> dict[str, Mapping[str, Any]]:
    """Name in the preset → what came of that attack, from the run's recordings."""
    from hpc.privacy.attack_run import attack_runs

    options = options_of(preset, job)
    results = attack_runs(folder, list(options.values()))
    documents = [result.document() for result in results]
    return {name: {key: found[key] for key in KEPT} for name, found in zip(options, documents, strict=True)}


def drop_recordings(folder: Path) -> None:
    """They hold the clients' text, and hundreds of runs' would fill a disc."""
    shutil.rmtree(folder / "recordings", ignore_errors=True)
