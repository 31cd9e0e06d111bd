"""A preset: the models, adapters, tasks and tables of one scale, from a YAML file in `launch/presets` or anywhere else.

scale: one line that every table carries
seeds: [0]
common: {train.clients: 2}              # flags of every run, as `launch/local.py` has them
models: {small: {model.name_or_path: smollm2-135m}}
adapters: {lora: {adapter.method: lora, train.learning_rate: 1.0e-3}}
tasks: {rte: {batches: 40, flags: {data.max_source_length: 128}}}
tables: {table1: [{model: small, adapters: [lora], tasks: [rte], methods: [zero_shot, centralised, serial]}]}
efficiency: {turns: 5, flags: {model.name_or_path: smollm2-135m}}    # all its flags; nothing of common
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from hpc.data.templates import FORMATS
from hpc.errors import ConfigError
from hpc.reproduce.methods import METHODS, ZERO_SHOT

Flags = Mapping[str, Any]


@dataclass(kw_only=True, frozen=True)
class TaskPlan:
    """How much of a task a run sees."""

    batches: int
    """Batches of single clients that a run trains on, whatever the method makes of them."""
    flags: Flags
    seeds: tuple[int, ...]
    folder: str
    """Under `--data_dir`."""


@dataclass(kw_only=True, frozen=True)
class Block:
    """One model's part of a table: the product of its tasks, adapters and methods."""

    model: str
    adapters: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[str, ...]


@dataclass(kw_only=True, frozen=True)
class Tuning:
    """How a learning rate is chosen: on a part of the training data, by the loss on the rest of it."""

    model: str
    tasks: tuple[str, ...]
    rates: Mapping[str, tuple[float, ...]]
    """Adapter → what is tried."""


@dataclass(kw_only=True, frozen=True)
class Efficiency:
    """How time is measured (`hpc.bench.efficiency`)."""

    turns: int
    flags: Flags
    """All there are: where time is measured, `common` and the models' flags say nothing."""
    clients: int = 8
    """Of the largest federation."""
    rings: int = 1
    """So many times fewer clients at the same time, for less memory; 16: each federation alone beside the uncut
    model."""

    def __post_init__(self) -> None:
        if min(self.turns, self.clients, self.rings) < 1:
            raise ValueError("efficiency: turns, clients and rings must be at least 1")


@dataclass(kw_only=True, frozen=True)
class Preset:
    """See the module."""

    name: str
    scale: str
    common: Flags
    models: Mapping[str, Flags]
    adapters: Mapping[str, Flags]
    tasks: Mapping[str, TaskPlan]
    tables: Mapping[str, tuple[Block, ...]]
    tuning: Tuning | None
    efficiency: Efficiency | None = None


FOLDERS = {
    "boolq": "superglue/BoolQ",
    "cb": "superglue/CB",
    "copa": "superglue/COPA",
    "multirc": "superglue/MultiRC",
    "record": "superglue/ReCoRD",
    "rte": "superglue/RTE",
    "wic": "superglue/WiC",
    "wsc": "superglue/WSC",
}
"""Task → its folder, where that has another name than the task."""


def load_preset(name: str, folder: Path) -> Preset:
    """The preset `name` of `folder`, or the YAML file of that name. Raises `ConfigError`."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise ConfigError(f"--preset {name} is not known; choose one of {known}, or give a YAML file like those")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--preset {name}: {path} cannot be read: {' '.join(str(error).split())}") from None
    try:
        return _preset(path.stem, content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        known = ", ".join(field.name for field in fields(Preset) if field.name != "name")
        raise ConfigError(f"--preset {name}: {path} is no preset ({_reason(error)}); it has {known}") from None


def _reason(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else str(error)


def _preset(name: str, content: Mapping[str, Any]) -> Preset:
    seeds = tuple(content["seeds"])
    tasks = {task: _task(task, plan, seeds) for task, plan in content["tasks"].items()}
    tables = {table: tuple(_block(each) for each in blocks) for table, blocks in content["tables"].items()}
    tuning, efficiency = content.get("tuning"), content.get("efficiency")
    preset = Preset(
        name=name,
        scale=" ".join(str(content["scale"]).split()),
        common=dict(content.get("common") or {}),
        models={model: dict(flags) for model, flags in content["models"].items()},
        adapters={adapter: dict(flags) for adapter, flags in content["adapters"].items()},
        tasks=tasks,
        tables=tables,
        tuning=None if tuning is None else _tuning(tuning),
        efficiency=None if efficiency is None else Efficiency(**efficiency),
    )
    for table, blocks in tables.items():
        for block in blocks:
            _check(f"table {table}", preset, block)
    return preset


def _task(name: str, plan: Mapping[str, Any], seeds: tuple[int, ...]) -> TaskPlan:
    return TaskPlan(
        batches=int(plan["batches"]),
        flags=dict(plan.get("flags") or {}),
        seeds=tuple(plan.get("seeds", seeds)),
        folder=str(plan.get("folder", FOLDERS.get(name, name))),
    )


def _block(content: Mapping[str, Any]) -> Block:
    names = {name: tuple(content[name]) for name in ("adapters", "tasks", "methods")}
    return Block(model=str(content["model"]), **names)


def _tuning(content: Mapping[str, Any]) -> Tuning:
    rates = {adapter: tuple(map(float, each)) for adapter, each in content["rates"].items()}
    return Tuning(model=str(content["model"]), tasks=tuple(content["tasks"]), rates=rates)


def _check(where: str, preset: Preset, block: Block) -> None:
    _known(where, "model", [block.model], preset.models)
    _known(where, "adapter", block.adapters, preset.adapters)
    _known(where, "task", block.tasks, preset.tasks)
    _known(where, "task", block.tasks, FORMATS)
    _known(where, "method", block.methods, [*METHODS, ZERO_SHOT])
    for method in block.methods:
        needed = METHODS[method].reference if method in METHODS else None
        if needed and needed not in block.methods:
            raise ValueError(f"{where} has {method} without {needed}, which it is compared with")


def _known(where: str, kind: str, given: Sequence[str], known: Any) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: {kind} {name!r} is not one of {', '.join(known)}")
