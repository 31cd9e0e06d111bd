"""From a preset to the runs of table 3: each task under each cut and defence, recorded, and attacked. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

from hpc.errors import ConfigError
from hpc.reproduce.methods import Method
from hpc.reproduce.plan import Cell, Job, job_of
from hpc.reproduce.preset import Attacks, Flags, Preset

TABLE = "table3"
ATTACKED = Method(
    name="attacked",
    title="FL-GLM, client-batch, each client its own head and tail",
    # Victim and colluder train heads of their own; with shared ones the attack would have an easier life.
    flags={"train.schedule": "client_batch", "train.aggregation": "none"},
    by_client=False,
)


def attack_jobs(preset: Preset, tasks: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Job]:
    """The runs that table 3 needs, of all tasks and seeds or some; undefended ones first.

    Raises `ConfigError` if the preset attacks nothing, or not that task.
    """
    attacks = preset.attacks
    if attacks is None:
        raise ConfigError(f"--preset {preset.name} has no {TABLE}: its section `attacks` would say what is attacked")
    if unknown := [task for task in tasks if task not in attacks.tasks]:
        raise ConfigError(f"--tasks {unknown[0]} is not in {TABLE}; choose of {', '.join(attacks.tasks)}")
    wanted = [task for task in attacks.tasks if not tasks or task in tasks]
    return [
        _job(preset, attacks, task, blocks, defence, seed)
        for seed in dict.fromkeys(seeds or preset.seeds)
        for defence, task, blocks in product(attacks.defences, wanted, attacks.cuts)
    ]


def attack_cells(jobs: Sequence[Job]) -> list[Cell]:
    """For --dry_run, which lists a table's cells."""
    return [
        Cell(
            table=TABLE,
            model=job.model,
            task=job.task,
            adapter=job.adapter,
            method=job.method,
            seed=job.seed,
            job=job,
        )
        for job in jobs
    ]


def variant_of(blocks: int, defence: str) -> str:
    """What the runs of a cut and a defence are called."""
    return f"cut{blocks}-{defence}"


def _tried(attacks: Attacks, defence: str) -> dict[str, Flags]:
    undefended = defence == next(iter(attacks.defences))
    names = list(attacks.methods) if undefended else attacks.on_defended or list(attacks.methods)
    more = {} if undefended else attacks.options_on_defended
    return {name: {**attacks.options, **attacks.methods[name], **more} for name in names}


def _job(preset: Preset, attacks: Attacks, task: str, blocks: int, defence: str, seed: int) -> Job:
    plan = preset.tasks[task]
    plan = replace(plan, batches=attacks.batches or plan.batches, flags={**plan.flags, **attacks.flags})
    attacked = replace(preset, tasks={**preset.tasks, task: plan})
    plain = job_of(attacked, attacks.model, task, attacks.adapter, ATTACKED, seed)
    own = dict(attacks.defences[defence])
    norm, steps = attacks.cuts[blocks], plain.flags["train.max_steps"]
    if norm is not None and own.keys() & {"privacy.noise_multiplier", "privacy.epsilon"}:
        own.setdefault("privacy.clip_norm", norm)
    recorded = {"model.head_blocks": blocks, "privacy.record_steps": min(attacks.steps or steps, steps)}
    return replace(
        plain,
        variant=variant_of(blocks, defence),
        flags={**plain.flags, **recorded, **own},
        attacks=_tried(attacks, defence),
    )
