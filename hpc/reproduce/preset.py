"""A preset: the models, adapters, tasks and tables of one scale, from a YAML file in `launch/presets` or anywhere else.

scale: one line that every table carries
seeds: [0]
common: {train.clients: 2}              # flags of every run, as `launch/local.py` has them
models: {small: {model.name_or_path: smollm2-135m}}
adapters: {lora: {adapter.method: lora, train.learning_rate: 1.0e-3}}
tasks: {rte: {batches: 40, flags: {data.max_source_length: 128}}}
tables: {table1: [{model: small, adapters: [lora], tasks: [rte], methods: [zero_shot, centralised, serial]}]}
estimate: {tflops: 0.05}                # what --dry_run counts with (`Assumptions`)
shapes: {small: {model_type: llama}}    # of models that are not here: their config.json, for --dry_run alone
efficiency: {turns: 5, flags: {model.name_or_path: smollm2-135m}}    # all its flags; nothing of common
attacks: {model: small, adapter: lora, tasks: [rte], cuts: {0: 3.0, 1: 45.0}, defences: {none: {}},
          methods: {nearest_embedding: {}}}    # table 3
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpc.data.folders import FOLDERS
from hpc.data.templates import FORMATS
from hpc.errors import ConfigError
from hpc.reproduce import sections
from hpc.reproduce.assumptions import Assumptions, assumptions
from hpc.reproduce.methods import METHODS, ZERO_SHOT

Flags = Mapping[str, Any]


@dataclass(kw_only=True, frozen=True)
class TaskPlan:
    """How much of a task a run sees."""

    batches: int
    """Batches of single clients that a run trains on, whatever the method makes of them; as many of each client, so
    that what is left over is left out."""
    flags: Flags = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    """None: the preset's."""
    folder: str = ""
    """Under `--data_dir`; none: the data set's own."""


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


@dataclass(kw_only=True, frozen=True)
class Attacks:
    """What an attacker recovers: a run for each task, cut and defence, and every attack on each (`attack_plan`)."""

    model: str
    adapter: str
    tasks: tuple[str, ...]
    cuts: Mapping[int, float | None]
    """Blocks of the client head → L2 norm that a defence with noise clips to, as norms grow with depth; none: a defence
    that needs one brings its own."""
    defences: Mapping[str, Flags]
    """The first one is the undefended run."""
    methods: Mapping[str, Flags]
    """Name → options, as `launch/attack.py` has them behind `--attack.`; `method` is the name if it is not given."""
    on_defended: tuple[str, ...] = ()
    """Those of `methods` that are tried on defended runs, too; none: all."""
    options_on_defended: Flags = field(default_factory=dict)
    """Over all others there."""
    options: Flags = field(default_factory=dict)
    """The same for all attacks."""
    batches: int = 0
    flags: Flags = field(default_factory=dict)
    """Over the task's own."""
    steps: int = 0
    """Of the first so many steps the attacker keeps what it sees; 0: of all."""


@dataclass(kw_only=True, frozen=True)
class Preset:
    """See the module."""

    name: str
    scale: str
    seeds: tuple[int, ...]
    models: Mapping[str, Flags]
    adapters: Mapping[str, Flags]
    tasks: Mapping[str, TaskPlan]
    tables: Mapping[str, tuple[Block, ...]]
    common: Flags = field(default_factory=dict)
    tuning: Tuning | None = None
    attacks: Attacks | None = None
    efficiency: Efficiency | None = None
    estimate: Assumptions = field(default_factory=Assumptions)
    shapes: Mapping[str, Flags] = field(default_factory=dict)


def load_preset(name: str, folder: Path) -> Preset:
    """The preset `name` of `folder`, or the YAML file of that name. Raises `ConfigError`."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in folder.glob("*.yaml")))
        raise ConfigError(f"--preset {name} is not known; choose one of {known}, or give a YAML file like those")
    if path.stem in {each.stem for each in folder.glob("*.yaml")} and path.resolve().parent != folder.resolve():
        raise ConfigError(f"--preset {name} would write over the results of our own {path.stem}; rename the file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"--preset {path} cannot be read: {' '.join(str(error).split())}") from None
    try:
        return _preset(path.stem, content)
    except ValueError as error:
        raise ConfigError(f"--preset {path} is no preset: {error}") from None


def _preset(name: str, content: object) -> Preset:
    given = sections.section(content, "it", Preset, aside=("name",))
    seeds = sections.seeds(given["seeds"], "seeds")
    preset = Preset(
        name=name,
        scale=" ".join(str(given["scale"]).split()),
        seeds=seeds,
        common=sections.flags(given.get("common"), "common"),
        models=_flags_of_each(given, "models"),
        adapters=_flags_of_each(given, "adapters"),
        tasks={task: _task(task, plan, seeds) for task, plan in sections.mapping(given["tasks"], "tasks").items()},
        tables={
            table: _blocks(blocks, f"tables.{table}")
            for table, blocks in sections.mapping(given["tables"], "tables").items()
        },
        tuning=None if given.get("tuning") is None else _tuning(given["tuning"]),
        attacks=None if given.get("attacks") is None else _attacks(given["attacks"]),
        efficiency=None if given.get("efficiency") is None else _efficiency(given["efficiency"]),
        estimate=assumptions(given.get("estimate")),
        shapes=_flags_of_each({"shapes": {}, **given}, "shapes"),
    )
    _known("tasks", "task", list(preset.tasks), FORMATS)
    for table, blocks in preset.tables.items():
        for block in blocks:
            _check(f"tables.{table}", preset, block)
    _known("shapes", "model", list(preset.shapes), preset.models)
    if preset.tuning:
        _known("tuning", "model", [preset.tuning.model], preset.models)
        _known("tuning", "task", preset.tuning.tasks, preset.tasks)
        _known("tuning", "adapter", list(preset.tuning.rates), preset.adapters)
    if preset.attacks:
        _known("attacks", "model", [preset.attacks.model], preset.models)
        _known("attacks", "adapter", [preset.attacks.adapter], preset.adapters)
        _known("attacks", "task", preset.attacks.tasks, preset.tasks)
        _known("attacks.on_defended", "attack", preset.attacks.on_defended, preset.attacks.methods)
    return preset


def _flags_of_each(content: Mapping[str, Any], key: str) -> dict[str, Flags]:
    return {name: sections.flags(each, f"{key}.{name}") for name, each in sections.mapping(content[key], key).items()}


def _task(name: str, content: object, seeds: tuple[int, ...]) -> TaskPlan:
    where = f"tasks.{name}"
    plan = sections.section(content, where, TaskPlan)
    return TaskPlan(
        batches=sections.at_least_one(plan["batches"], f"{where}.batches"),
        flags=sections.flags(plan.get("flags"), f"{where}.flags"),
        seeds=sections.seeds(plan["seeds"], f"{where}.seeds") if "seeds" in plan else seeds,
        folder=str(plan.get("folder") or FOLDERS.get(name, (name,))[0]),
    )


def _blocks(content: object, where: str) -> tuple[Block, ...]:
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where} must be a list of parts, each with model, adapters, tasks and methods")
    return tuple(_block(each, f"{where}[{number}]") for number, each in enumerate(content))


def _block(content: object, where: str) -> Block:
    given = sections.section(content, where, Block)
    lists = {name: sections.names(given[name], f"{where}.{name}") for name in ("adapters", "tasks", "methods")}
    return Block(model=str(given["model"]), **lists)


def _tuning(content: object) -> Tuning:
    given = sections.section(content, "tuning", Tuning)
    rates = sections.mapping(given["rates"], "tuning.rates")
    return Tuning(
        model=str(given["model"]),
        tasks=sections.names(given["tasks"], "tuning.tasks"),
        rates={adapter: sections.rates(each, f"tuning.rates.{adapter}") for adapter, each in rates.items()},
    )


def _attacks(content: object) -> Attacks:
    given = sections.section(content, "attacks", Attacks)
    return Attacks(
        model=str(given["model"]),
        adapter=str(given["adapter"]),
        tasks=sections.names(given["tasks"], "attacks.tasks"),
        cuts=sections.cuts(given["cuts"], "attacks.cuts"),
        defences=_flags_of_each({"attacks.defences": given["defences"]}, "attacks.defences"),
        methods=_flags_of_each({"attacks.methods": given["methods"]}, "attacks.methods"),
        on_defended=sections.names(given["on_defended"], "attacks.on_defended") if "on_defended" in given else (),
        options=sections.flags(given.get("options"), "attacks.options"),
        options_on_defended=sections.flags(given.get("options_on_defended"), "attacks.options_on_defended"),
        flags=sections.flags(given.get("flags"), "attacks.flags"),
        **{
            name: sections.at_least_one(given[name], f"attacks.{name}")
            for name in ("batches", "steps")
            if name in given
        },
    )


def _efficiency(content: object) -> Efficiency:
    given = sections.section(content, "efficiency", Efficiency)
    numbers = {key: sections.at_least_one(given[key], f"efficiency.{key}") for key in given if key != "flags"}
    return Efficiency(flags=sections.flags(given["flags"], "efficiency.flags"), **numbers)


def _check(where: str, preset: Preset, block: Block) -> None:
    _known(where, "model", [block.model], preset.models)
    _known(where, "adapter", block.adapters, preset.adapters)
    _known(where, "task", block.tasks, preset.tasks)
    _known(where, "method", block.methods, [*METHODS, ZERO_SHOT])
    for method in block.methods:
        needed = METHODS[method].reference if method in METHODS else None
        if needed and needed not in block.methods:
            raise ValueError(f"{where} has {method} without {needed}, which it is compared with")


def _known(where: str, kind: str, given: Sequence[str], known: Any) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: {kind} {name!r} is not one of {', '.join(known)}")
