"""Which adapter of a run's folder is meant: a client's, as the run left it at its end, or out of a checkpoint."""

from __future__ import annotations

import filecmp
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from hpc.checkpoint import checkpoint_folder, read_role
from hpc.cli import make_parser, parse
from hpc.config import Config
from hpc.errors import CheckpointError, ConfigError
from hpc.export.folder import TRAINED, WEIGHTS, check_values, read_folder
from hpc.export.layout import Layout
from hpc.export.origin import Origin
from hpc.export.portable import portable
from hpc.export.save import FOLDER
from hpc.resume import committed_steps
from hpc.schedule import clients_of_step

CENTRALISED = "centralised"

_log = logging.getLogger("hpc")


@dataclass(kw_only=True, frozen=True)
class Picked:
    """What learned (portable names), whose it is, and which model it belongs to."""

    values: Mapping[str, torch.Tensor]
    origin: Origin
    layout: Layout


def pick(run: Path, client: int | None, checkpoint: str | None) -> Picked:
    """Raises `ConfigError` for a folder without a run or a client that it does not have, `CheckpointError` for what is
    missing, broken, or of another model.
    """
    config = read_run_config(run)
    if checkpoint is not None:
        return _of_checkpoint(run, config, client, checkpoint)
    folder = _adapter_folder(run, config, client)
    values, origin, layout = read_folder(folder)
    if config is not None:
        origin.require_same(Origin.of(config, origin.role), str(folder))
    return Picked(values=values, origin=origin, layout=layout)


def read_run_config(run: Path) -> Config | None:
    """The run's configuration; None on a client's machine, where only the adapter is. Raises `ConfigError`."""
    path = run / "config.yaml"
    if path.is_file():
        return parse(make_parser(""), ["--config", str(path)])[0]
    if not (run / FOLDER).is_dir():
        raise ConfigError(f"{run} is not a run's folder: it has neither config.yaml nor {FOLDER}/")
    return None


def _adapter_folder(run: Path, config: Config | None, client: int | None) -> Path:
    _check_client(config, client)
    there = _roles(run)
    if not there:
        raise CheckpointError(f"{run} has no {FOLDER}/ with an adapter: {_why_none(run, config)}")
    if client is None:
        _warn_if_they_differ(run, there)
        return run / FOLDER / there[0]
    if f"client-{client}" not in there:
        raise ConfigError(f"--client {client} left no adapter in {run}; there is that of {', '.join(there)}")
    return run / FOLDER / f"client-{client}"


def _roles(run: Path) -> list[str]:
    """Whose adapters are there, clients by number."""
    names = [path.name for path in (run / FOLDER).glob("*") if path.is_dir()]
    fitting = [name for name in names if re.fullmatch(rf"client-\d+|{CENTRALISED}", name)]
    return sorted(fitting, key=lambda name: (len(name), name))


def _check_client(config: Config | None, client: int | None) -> None:
    if config is None or client is None:
        return
    if config.train.schedule == CENTRALISED:
        raise ConfigError(f"--client {client}: a centralised run has one adapter; leave --client out")
    if not 0 <= client < config.train.clients:
        raise ConfigError(f"--client {client} is not in this run; its clients are 0 to {config.train.clients - 1}")


def _why_none(run: Path, config: Config | None) -> str:
    why = "it has not ended" if config is None or config.run.save_adapter else "it ran with --run.save_adapter false"
    steps = committed_steps(run)
    if not steps:
        return f"{why}, and there is no finished checkpoint either"
    return f"{why}; give --checkpoint with one of {', '.join(f'checkpoint-{step}' for step in steps)}"


def _warn_if_they_differ(run: Path, roles: list[str]) -> None:
    files = [run / FOLDER / role / name for role in roles for name in (WEIGHTS, TRAINED)]
    there = [path for path in files if path.is_file()]
    if any(not filecmp.cmp(there[0], other, shallow=False) for other in there[1:]):
        _log.warning("the clients' adapters differ; this is that of %s, --client chooses another", roles[0])


def _of_checkpoint(run: Path, config: Config | None, client: int | None, which: str) -> Picked:
    if config is None:
        raise ConfigError(f"--checkpoint {which}: {run} has no config.yaml, which the trunk writes; export where it is")
    _check_client(config, client)
    steps = committed_steps(run)
    if which not in [f"checkpoint-{step}" for step in steps]:
        have = ", ".join(f"checkpoint-{step}" for step in steps) or "no finished checkpoint"
        raise CheckpointError(f"--checkpoint {which}: {run} holds {have}")
    step = int(which.removeprefix("checkpoint-"))
    folder = checkpoint_folder(run, step)
    client = _newest(config, step) if client is None else client
    role = CENTRALISED if config.train.schedule == CENTRALISED else f"client-{client}"
    layout = Layout.of(config.model, config.adapter)
    values = portable(_parameters(folder, role) | _trunk_parameters(folder, config, client))
    check_values(values, layout, str(folder))
    return Picked(values=values, origin=Origin.of(config, role), layout=layout)


def _newest(config: Config, step: int) -> int:
    """The client with the newest parts at this step: where they are handed on, whoever has trained last."""
    return clients_of_step(config.train, step - 1)[0] if config.train.hands_over else 0


def _trunk_parameters(folder: Path, config: Config, client: int) -> dict[str, torch.Tensor]:
    if config.train.schedule == CENTRALISED or "trunk" not in config.adapter.parts:
        return {}
    if config.train.schedule == "replica":
        own = f"replica-{client}/"  # in whichever rank's file: ranks may have been others then
        found = [_parameters(folder, path.stem, own) for path in sorted(folder.glob("trunk-*.safetensors"))]
        return next((values for values in found if values), {})
    return _parameters(folder, "trunk")


def _parameters(folder: Path, role: str, prefix: str = "") -> dict[str, torch.Tensor]:
    if not (folder / f"{role}.safetensors").is_file():
        raise CheckpointError(
            f"{folder} holds no {role}.safetensors: it was written on another machine. Export where all its files "
            "are, or from the end of the run, when the clients have the trunk's part too"
        )
    start = f"{prefix}parameter/"
    state, _ = read_role(folder, role)
    return {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
