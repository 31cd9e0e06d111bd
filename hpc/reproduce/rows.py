"""From runs' files to a table's rows: means over seeds, and how far a row is from its reference. Pure.

Metrics are in percent, their differences in percentage points, losses in nats a label token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from hpc.metrics.spread import Spread, mean_sd
from hpc.metrics.table import UNPARSED
from hpc.reproduce.attack_plan import attack_jobs
from hpc.reproduce.methods import METHODS
from hpc.reproduce.plan import Cell, cells_of, tuning_jobs
from hpc.reproduce.preset import Preset
from hpc.reproduce.raw import FOLDER, Raw

Runs = Mapping[str, Raw]
"""A run's name → its file's content."""
Key = tuple[str, str, str, str]
"""Model, task, adapter, method."""


@dataclass(kw_only=True, frozen=True)
class Result:
    """One seed of a row."""

    seed: int
    run: str
    """The raw file's name, without its ending."""
    metrics: Mapping[str, float]
    """The main one first."""
    unparsed: int
    examples: int
    digest: str
    """Equal digests: equal predictions."""
    losses: Sequence[float]
    """Of the training steps; none of a model as it was before training."""
    data: str | None = None
    """SHA-256 of the files that it learnt from and was scored on."""


@dataclass(kw_only=True, frozen=True)
class Comparison:
    """A row against its reference, over the seeds that both have."""

    reference: str
    loss_bound: float | None
    """See `Method.loss_bound`."""
    differences: Mapping[str, Sequence[float]]
    """Metric → one's own less the reference's, a seed each."""
    equal: Sequence[bool]
    """Whether the predictions are, a seed each."""
    loss: float
    """Largest absolute difference of a training step's losses; infinite if one trained for more steps."""
    relative_loss: float
    """The same in parts of the mean of the reference's losses: a single step's may be next to nothing."""

    @property
    def is_kept(self) -> bool:
        """Whether metrics and predictions are exactly the reference's in every seed, and losses within the bound."""
        alike = all(self.equal) and not any(map(any, self.differences.values()))
        return alike and self.loss_bound is not None and self.relative_loss <= self.loss_bound


@dataclass(kw_only=True, frozen=True)
class Row:
    """A task under an adapter and a method."""

    table: str
    model: str
    task: str
    adapter: str
    method: str
    planned: int
    """Seeds that there should be."""
    results: Sequence[Result] = field(default_factory=tuple)
    comparison: Comparison | None = None

    @property
    def metrics(self) -> dict[str, Spread]:
        """Over the seeds; the main metric first. Empty where no run is there."""
        names = self.results[0].metrics if self.results else ()
        return {name: mean_sd([result.metrics[name] for result in self.results]) for name in names}

    @property
    def unparsed(self) -> int:
        """Over all seeds."""
        return sum(result.unparsed for result in self.results)


def sort_out(preset: Preset, found: Iterable[Raw]) -> tuple[dict[str, Raw], list[str]]:
    """The runs that the preset would do in just that way, by name; and a line about the others, if there are any."""
    raws = list(found)
    jobs = [cell.job for cell in _cells(preset, list(preset.tables), raws)]
    tuning = [] if preset.tuning is None else tuning_jobs(preset)
    attacked = [] if preset.attacks is None else attack_jobs(preset, seeds=[*preset.seeds, *_seeds(raws)])
    wanted = {job.name: job.fingerprint for job in [*jobs, *tuning, *attacked]}
    used = {raw["job"]: raw for raw in raws if wanted.get(raw["job"]) == raw["fingerprint"]}
    others = [raw["job"] for raw in raws if raw["job"] not in used]
    stale = [name for name in others if name in wanted]
    foreign = [name for name in others if name not in wanted]
    notes = [
        *_note(
            preset, stale, f"made with other settings than preset {preset.name} has now; its run is to be done again"
        ),
        *_note(preset, foreign, f"of no run that preset {preset.name} has"),
    ]
    return used, notes


def rows_of(preset: Preset, table: str, runs: Runs) -> list[Row]:
    """The rows of a table in the preset's order, the untrained model first; those without a run are empty.

    `runs`: as `sort_out` has them. Seeds that the preset does not have count where they were run.
    """
    groups: dict[Key, dict[int, Cell]] = {}
    for cell in _cells(preset, [table], list(runs.values())):
        groups.setdefault((cell.model, cell.task, cell.adapter, cell.method), {})[cell.seed] = cell
    results = {key: _results(cells.values(), runs) for key, cells in groups.items()}
    planned = {key: _planned(preset, key, cells, runs) for key, cells in groups.items()}
    rows = [_row(table, key, results, planned[key]) for key in groups]
    return sorted(rows, key=lambda row: row.adapter != "none")


def compare(results: Sequence[Result], others: Sequence[Result], method: str) -> Comparison | None:
    """With the results of the method's reference on the same data; `None` where no seed has both."""
    by_seed = {(other.seed, other.data): other for other in others}
    keys = [(result.seed, result.data) for result in results]
    pairs = [(result, by_seed[key]) for key, result in zip(keys, results, strict=True) if key in by_seed]
    reference = METHODS[method].reference if method in METHODS else None
    if not pairs or reference is None:
        return None
    names = pairs[0][0].metrics
    losses = [_loss_difference(one.losses, other.losses) for one, other in pairs]
    means = [fmean(other.losses) or math.nan for _, other in pairs]
    return Comparison(
        reference=reference,
        loss_bound=METHODS[method].loss_bound,
        differences={name: [one.metrics[name] - other.metrics[name] for one, other in pairs] for name in names},
        equal=[one.digest == other.digest for one, other in pairs],
        loss=_largest(losses),
        relative_loss=_largest([loss / mean if loss else 0.0 for loss, mean in zip(losses, means, strict=True)]),
    )


def _cells(preset: Preset, tables: Sequence[str], raws: Sequence[Raw]) -> list[Cell]:
    """The preset's cells, and those of other seeds that somebody has run."""
    others = _seeds(raws)
    return cells_of(preset, tables, (), ()) + (cells_of(preset, tables, (), others) if others else [])


def _seeds(raws: Sequence[Raw]) -> list[int]:
    return sorted({int(raw["seed"]) for raw in raws})


def _planned(preset: Preset, key: Key, cells: Mapping[int, Cell], runs: Runs) -> int:
    own = preset.tasks[key[1]].seeds
    return sum(seed in own or cell.job.name in runs for seed, cell in cells.items())


def _results(cells: Iterable[Cell], runs: Runs) -> list[Result]:
    found = [_result(cell, runs[cell.job.name]) for cell in cells if cell.job.name in runs]
    return sorted(found, key=lambda result: result.seed)


def _result(cell: Cell, raw: Raw) -> Result:
    when = "_before" if cell.at_start else ""
    metrics = dict(raw[f"metrics{when}"])
    return Result(
        seed=cell.seed,
        run=cell.job.name,
        unparsed=int(metrics.pop(UNPARSED)),
        metrics=metrics,
        examples=raw["examples"],
        digest=raw[f"predictions{when}"]["sha256"],
        losses=() if cell.at_start else raw["losses"],
        data=raw["data_sha256"],
    )


def _row(table: str, key: Key, results: Mapping[Key, Sequence[Result]], planned: int) -> Row:
    model, task, adapter, method = key
    reference = METHODS[method].reference if method in METHODS else None
    others = results[(model, task, adapter, reference)] if reference else ()
    return Row(
        table=table,
        model=model,
        task=task,
        adapter=adapter,
        method=method,
        planned=planned,
        results=results[key],
        comparison=compare(results[key], others, method),
    )


def _note(preset: Preset, names: Sequence[str], reason: str) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return [f"not used: {FOLDER / preset.name / names[0]}.json{more}: {reason}"]


def _loss_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest of all steps; infinite where one was trained for longer."""
    if len(losses) != len(others):
        return math.inf
    return _largest([abs(one - other) for one, other in zip(losses, others, strict=True)])


def _largest(values: Sequence[float]) -> float:
    """Not a number if any is none: `max` would overlook it."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)
