"""From a preset to runs: what each table needs, each run once, and what a run is called. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpc.config import AdapterConfig, TrainConfig
from hpc.errors import ConfigError
from hpc.reproduce.methods import CENTRALISED, METHODS, ZERO_SHOT, Method
from hpc.reproduce.preset import Block, Preset

# What the plan itself says of each run; and who takes part in a step is the methods'.
OWNED = {
    "data.task",
    "data.save_predictions",
    "train.seed",
    "train.max_steps",
    "train.rounds",
    "train.schedule",
    "train.order",
    "train.eval_before",
    "train.clients_per_round",
}


@dataclass(kw_only=True, frozen=True)
class Job:
    """One run. Its data's folder is under `--data_dir`, which is not part of what it is."""

    model: str
    task: str
    adapter: str
    method: str
    seed: int
    flags: Mapping[str, Any]
    tuning: bool = False
    """Tries a learning rate, on a part of the training data."""
    variant: str = ""
    """What sets it apart from runs that are alike in everything above."""
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name → method and options: what is tried on the run's recordings when it has ended."""

    @property
    def name(self) -> str:
        rate = f"-lr{self.flags['train.learning_rate']:g}" if self.tuning else ""
        variant = f"-{self.variant}" if self.variant else ""
        return f"{self.model}-{self.task}-{self.adapter}-{self.method}-seed{self.seed}{rate}{variant}"

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the result: a result with another one was made with other settings."""
        attacks = {"attacks": self.attacks} if self.attacks else {}
        text = json.dumps({"flags": self.flags, "tuning": self.tuning, **attacks}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(kw_only=True, frozen=True)
class Cell:
    """What one number of a table comes from."""

    table: str
    model: str
    task: str
    adapter: str
    method: str
    seed: int
    job: Job
    at_start: bool = False
    """The model as it was before training."""


def cells_of(preset: Preset, tables: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells of some tables, first seeds first. `tasks`, `seeds`: only these; none: all that the preset has.

    Raises `ConfigError` for a task or a table that the preset does not have.
    """
    blocks = [(table, block) for table in tables for block in _blocks(preset, table)]
    known = list(dict.fromkeys(task for _, block in blocks for task in block.tasks))
    if unknown := [task for task in tasks if task not in known]:
        raise ConfigError(f"--tasks {unknown[0]} is not in {', '.join(tables)}; choose of {', '.join(known)}")
    found = [
        (place, cell)
        for table, block in blocks
        for task in block.tasks
        if not tasks or task in tasks
        for place, seed in enumerate(dict.fromkeys(seeds or preset.tasks[task].seeds))
        for cell in _cells_of_task(preset, table, block, task, seed)
    ]
    # Stable: a table is whole, with one seed, as early as can be. Parts of a table may have a cell in common.
    return list({_key(cell): cell for _, cell in sorted(found, key=lambda each: each[0])}.values())


def jobs_of(cells: Sequence[Cell]) -> list[Job]:
    """Each run once, in the cells' order."""
    return list({cell.job.name: cell.job for cell in cells}.values())


def tuning_jobs(preset: Preset, tasks: Sequence[str] = ()) -> list[Job]:
    """The runs among which a learning rate is chosen, of all tasks or some.

    Raises `ConfigError` if the preset chooses none, or not for a task.
    """
    tuning = preset.tuning
    if tuning is None:
        raise ConfigError(f"--preset {preset.name} tries no learning rates: its section `tuning` would say which")
    if unknown := [task for task in tasks if task not in tuning.tasks]:
        raise ConfigError(f"--tasks {unknown[0]} is not tuned; choose of {', '.join(tuning.tasks)}")
    return [
        job_of(preset, tuning.model, task, adapter, CENTRALISED, 0, rate=rate)
        for task in tasks or tuning.tasks
        for adapter, rates in tuning.rates.items()
        for rate in rates
    ]


def _key(cell: Cell) -> tuple[str | int, ...]:
    return (cell.table, cell.model, cell.task, cell.adapter, cell.method, cell.seed)


def _blocks(preset: Preset, table: str) -> Sequence[Block]:
    if table not in preset.tables:
        raise ConfigError(f"--preset {preset.name} has no {table}; it has {', '.join(preset.tables)}")
    for block in preset.tables[table]:
        if ZERO_SHOT in block.methods and _starts_as_published(preset, block) is None:
            raise ConfigError(
                f"--preset {preset.name}: {table} has {ZERO_SHOT}, but each adapter ({', '.join(block.adapters)}) "
                "changes the model before it is trained; add one with adapter.method lora, or leave the method out"
            )
    return preset.tables[table]


def _cells_of_task(preset: Preset, table: str, block: Block, task: str, seed: int) -> Iterator[Cell]:
    for adapter in block.adapters:
        for method in block.methods:
            zero = method == ZERO_SHOT
            # Before its first step a LoRA adapter changes nothing; a prefix does. The seed has no say in it either, as
            # held-out examples are the same for all.
            if zero and (adapter != _starts_as_published(preset, block) or seed != preset.tasks[task].seeds[0]):
                continue
            trained = METHODS["centralised" if zero else method]
            yield Cell(
                table=table,
                model=block.model,
                task=task,
                adapter="none" if zero else adapter,
                method=method,
                seed=seed,
                job=job_of(preset, block.model, task, adapter, trained, seed),
                at_start=zero,
            )


def _starts_as_published(preset: Preset, block: Block) -> str | None:
    """The first adapter of a block that leaves the model as it is until it is trained."""
    return next((name for name in block.adapters if _leaves_as_it_is(_flags(preset, block.model, name))), None)


def _leaves_as_it_is(flags: Mapping[str, Any]) -> bool:
    return flags.get("adapter.method", AdapterConfig().method) in ("lora", "full")


def _flags(preset: Preset, model: str, adapter: str, task: str | None = None) -> dict[str, Any]:
    own = {} if task is None else preset.tasks[task].flags
    return {**preset.common, **preset.models[model], **preset.adapters[adapter], **own}


def job_of(
    preset: Preset, model: str, task: str, adapter: str, method: Method, seed: int, *, rate: float | None = None
) -> Job:
    """Raises `ConfigError` where the preset's flags say what is the plan's to say."""
    plan, given = preset.tasks[task], _flags(preset, model, adapter, task)
    if owned := sorted(OWNED & given.keys()):
        raise ConfigError(
            f"--preset {preset.name}: {owned[0]} is not for flags: tasks, methods, batches and seeds say it; "
            "leave it out"
        )
    flags = {
        "data.task": task,
        **given,
        **method.flags,
        "train.seed": seed,
        "data.save_predictions": True,
    }
    turns = _rounds(preset, task, flags)
    flags["train.max_steps"] = turns * (_clients(preset, flags) if method.by_client else 1)
    # The uncut model tells how good it is untrained; what it tells would be the same in the other rows.
    zero_shot = method is CENTRALISED and _leaves_as_it_is(flags) and rate is None
    flags["train.eval_before"] = zero_shot and seed == plan.seeds[0]
    if rate is not None:
        flags["train.learning_rate"] = rate
    return Job(
        model=model, task=task, adapter=adapter, method=method.name, seed=seed, flags=flags, tuning=rate is not None
    )


def _rounds(preset: Preset, task: str, flags: Mapping[str, Any]) -> int:
    """Batches of each client: whole turns, so that all methods learn from as many examples of each."""
    batches, clients = preset.tasks[task].batches, _clients(preset, flags)
    turn = flags.get("train.sync_every", TrainConfig().sync_every)
    rounds = batches // (clients * turn) * turn
    if rounds < 1:
        raise ConfigError(
            f"--preset {preset.name}: tasks.{task}.batches is {batches}, less than one turn of {turn} "
            f"(train.sync_every) for each of {clients} clients (train.clients); raise it"
        )
    return int(rounds)


def _clients(preset: Preset, flags: Mapping[str, Any]) -> int:
    clients = flags.get("train.clients", TrainConfig().clients)
    if type(clients) is not int or clients < 1:
        raise ConfigError(f"--preset {preset.name}: train.clients is {clients!r}; it must be at least 1")
    return clients
