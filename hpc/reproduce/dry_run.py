"""`--dry_run` of the tables: the runs, which are done, and what they will take. Starts nothing, reads no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hpc.bench.markdown import table
from hpc.cli import parse_quickly
from hpc.config import Config
from hpc.errors import ConfigError, ModelError
from hpc.preflight import check_cut
from hpc.report.cells import size
from hpc.reproduce.estimate import NOTES, ModelSize, run_link_bytes, run_seconds, step_link_bytes
from hpc.reproduce.plan import Cell, Job
from hpc.reproduce.preset import Preset
from hpc.reproduce.run import OWN_SOURCE, QUIETLY, as_flag
from hpc.source.cut import Cut
from hpc.source.resolve import cut_of, read_config, resolve

COLUMNS = (
    "table", "model", "task", "adapter", "method", "seeds", "done", "steps", "time a run",
    "trunk", "client", "uncut", "MB a step", "GB a run",
)  # fmt: skip
WORDS = 6
ROLES = ("trunk", "client", "centralised")


@dataclass(kw_only=True, frozen=True)
class Planned:
    """A run, and what it will take."""

    job: Job
    tables: tuple[str, ...]
    done: bool
    steps: int
    seconds: float
    roles: Mapping[str, int]
    """Kind of role → bytes of memory."""
    step_link_bytes: float
    link_bytes: float


@dataclass(kw_only=True)
class Estimator:
    """Each model is studied once for each cut and adapter."""

    preset: Preset
    _seen: dict[Any, Any] = field(default_factory=dict)

    def config_of(self, job: Job) -> Config:
        """The job's flags, checked as the run will check them, against the model's own configuration, too.

        Raises `ConfigError` or `ModelError`.
        """
        flags = [text for key, value in job.flags.items() for text in (f"--{key}", as_flag(value))]
        if OWN_SOURCE.isdisjoint(job.flags):
            flags += ["--data.data_dir", f"data/{self.preset.tasks[job.task].folder}"]
        try:
            return parse_quickly([*flags, *QUIETLY])
        except ConfigError as error:
            raise ConfigError(f"--preset {self.preset.name}: {error} (in the flags of {job.name})") from None

    def planned(self, job: Job, tables: tuple[str, ...], *, done: bool) -> Planned:
        config, assumed = self.config_of(job), self.preset.estimate
        hf_config, raw_config = self._model(job.model, config)
        check_cut(config, raw_config)
        roles = self._roles(config, hf_config, cut_of(config.model, raw_config))
        trunk, client = roles["trunk"], roles["client"]
        model_size = ModelSize(
            hidden_size=trunk.hidden_size,
            value_bytes={"float32": 4}.get(config.model.dtype, 2),
            block_values=trunk.block_values + client.block_values,
            client_learning=client.learning,
        )
        return Planned(
            job=job,
            tables=tables,
            done=done,
            steps=config.train.max_steps,
            seconds=run_seconds(config, model_size, assumed),
            roles=_memory(config, roles),
            step_link_bytes=step_link_bytes(config, model_size),
            link_bytes=run_link_bytes(config, model_size, assumed),
        )

    def _model(self, name: str, config: Config) -> tuple[Any, dict[str, Any]]:
        """transformers' configuration and config.json: of the shape that the preset gives, or of the model itself."""
        return self._once(("model", name), lambda: _configuration(name, self.preset, config))

    def _roles(self, config: Config, hf_config: Any, cut: Cut) -> Any:
        """Weights of trunk and client; the uncut model holds what they hold together."""
        from hpc.model.estimate import role_weights

        split = replace(config, train=replace(config.train, schedule="client_batch", aggregation="auto"))
        key = (config.model, repr(config.adapter), config.trunk.quantization)
        return self._once(key, lambda: role_weights(split, hf_config, cut))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._seen:
            self._seen[key] = make()
        return self._seen[key]


def _configuration(name: str, preset: Preset, config: Config) -> tuple[Any, dict[str, Any]]:
    from hpc.model.pretrained import config_of_shape, load_hf_config

    shape = preset.shapes.get(name)
    if shape is not None:
        return config_of_shape(shape), dict(shape)
    try:
        resolver = resolve(config.model)
        raw_config = read_config(resolver)
    except ModelError as error:
        raise ModelError(f"{error}; or give {name} in the preset's shapes, and --dry_run does without") from None
    return load_hf_config(resolver), raw_config


def _memory(config: Config, weights: Mapping[str, Any]) -> dict[str, int]:
    from hpc.model.estimate import bytes_of

    roles = {kind: bytes_of(kind, each, config) for kind, each in weights.items()}
    return {"centralised": sum(roles.values())} if config.train.schedule == "centralised" else roles


def planned_runs(
    preset: Preset, jobs: Sequence[Job], cells: Sequence[Cell], is_done: Callable[[Job], bool]
) -> list[Planned]:
    """Raises `ConfigError` or `ModelError` for a run that would be refused."""
    tables: dict[str, list[str]] = {}
    for cell in cells:
        tables.setdefault(cell.job.name, []).append(cell.table)
    estimator = Estimator(preset=preset)
    return [
        estimator.planned(job, tuple(dict.fromkeys(tables.get(job.name, ["tune"]))), done=is_done(job)) for job in jobs
    ]


def report(preset: Preset, runs: Sequence[Planned]) -> str:
    """A line for each task, adapter and method with its seeds; then what all of them come to."""
    from hpc.model.estimate import CONTENTS

    todo = [run for run in runs if not run.done]
    most = {kind: max((run.roles.get(kind, 0) for run in runs), default=0) for kind in ROLES}
    speed = f"{preset.estimate.tflops:g} * 10^12 operations a second, {preset.estimate.start_s:g} s to start a run"
    return "\n".join(
        [
            preset.scale,
            "",
            table(COLUMNS, [_line(group) for group in _groups(runs)], words=WORDS),
            "",
            f"{len(runs)} runs, {len(runs) - len(todo)} done already; left: {len(todo)} runs, "
            f"about {_time(sum(run.seconds for run in todo))} one after another, "
            f"{sum(run.link_bytes for run in todo) / 1e9:,.1f} GB over the links",
            f"most memory: {', '.join(f'{kind} {size(number)}' for kind, number in most.items())}",
            "",
            f"speed assumed: {speed}",
            NOTES,
            CONTENTS,
            "Dry run: nothing was started.",
        ]
    )


def _groups(runs: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Runs that differ in their seed (and in whether the model is scored untrained, too)."""
    groups: dict[Any, list[Planned]] = {}
    for run in runs:
        rate = run.job.flags["train.learning_rate"] if run.job.tuning else None
        kind = (run.job.model, run.job.task, run.job.adapter, run.job.method, run.job.variant, rate)
        groups.setdefault(kind, []).append(run)
    first = {table: place for place, table in enumerate(dict.fromkeys(run.tables[0] for run in runs))}
    yield from sorted(groups.values(), key=lambda group: first[group[0].tables[0]])


def _line(group: Sequence[Planned]) -> list[str]:
    run, job = group[0], group[0].job
    rate = f" lr {job.flags['train.learning_rate']:g}" if job.tuning else ""
    memory = [size(run.roles.get(kind)) for kind in ROLES]
    cut = "centralised" not in run.roles
    return [
        "+".join(run.tables),
        job.model,
        job.task,
        job.adapter + rate,
        " ".join(filter(None, (job.method, job.variant))),
        " ".join(str(each.job.seed) for each in group),
        f"{sum(each.done for each in group)}/{len(group)}",
        str(run.steps),
        _time(max(each.seconds for each in group)),
        *memory,
        f"{run.step_link_bytes / 1e6:.2f}" if cut else "-",
        f"{run.link_bytes / 1e9:.2f}" if cut else "-",
    ]


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"
