"""Which learning rate was chosen, and from what: the held-out loss of each rate that was tried. Pure.

The runs learn on a part of the training data and are judged on the rest of it (`hpc.reproduce.tuning_data`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan, nan
from statistics import fmean

from hpc.bench.markdown import table as markdown
from hpc.reproduce import conditions
from hpc.reproduce.numbers import NOTHING
from hpc.reproduce.plan import Job, tuning_jobs
from hpc.reproduce.preset import Preset
from hpc.reproduce.raw import FOLDER
from hpc.reproduce.rows import Runs

RATE = "train.learning_rate"
HOW = (
    "Loss on held-out examples (nats a label token) of centralised training, seed 0. A task's training file is divided "
    "in five: examples from four parts teach, examples from the fifth judge, as many as the last columns say; what the "
    "tables are scored on is not looked at. A rate is chosen for each adapter by its mean over the tasks, and all "
    "methods use it."
)


@dataclass(kw_only=True, frozen=True)
class Tried:
    """One rate of one adapter."""

    adapter: str
    rate: float
    losses: Sequence[float | None]
    """After training, of each tuning task, in nats a label token; none where the run is not there."""
    used: bool
    """Whether it is the preset's."""

    @property
    def mean(self) -> float | None:
        """Over all tasks; rates are compared on the same tasks or not at all."""
        known = [loss for loss in self.losses if loss is not None]
        return fmean(known) if len(known) == len(self.losses) else None


def tried(preset: Preset, runs: Runs) -> list[Tried]:
    """All that the preset's section `tuning` would try, in its order. Raises `ConfigError` if it has none."""
    groups: dict[tuple[str, float], list[Job]] = {}
    for job in tuning_jobs(preset):
        groups.setdefault((job.adapter, job.flags[RATE]), []).append(job)
    return [
        Tried(
            adapter=adapter,
            rate=rate,
            losses=[float(runs[job.name]["eval_loss"]) if job.name in runs else None for job in jobs],
            used=rate == float(preset.adapters[adapter].get(RATE, nan)),
        )
        for (adapter, rate), jobs in groups.items()
    ]


def best(rates: Sequence[Tried], adapter: str) -> Tried | None:
    """The lowest mean loss of an adapter's rates; `None` while one of them is not known."""
    own = [(each.mean, each) for each in rates if each.adapter == adapter]
    known = [(inf if isnan(mean) else mean, each) for mean, each in own if mean is not None]
    return min(known, key=lambda pair: pair[0])[1] if known and len(known) == len(own) else None


def page(preset: Preset, runs: Runs) -> str:
    rates = tried(preset, runs)
    jobs = tuning_jobs(preset)
    tasks = list(dict.fromkeys(job.task for job in jobs))
    winners = [best(rates, adapter) for adapter in dict.fromkeys(each.adapter for each in rates)]
    lines = [
        [
            each.adapter,
            f"{each.rate:g}",
            *(NOTHING if loss is None else f"{loss:.4f}" for loss in each.losses),
            NOTHING if each.mean is None else f"{each.mean:.4f}",
            "best" if each in winners else "",
            "used" if each.used else "",
        ]
        for each in rates
    ]
    used = [runs[job.name] for job in jobs if job.name in runs]
    heads = ("adapter", "learning rate", *tasks, "mean", "lowest", "in the preset")
    return (
        "\n\n".join(
            [
                f"# Learning rates, preset {preset.name}",
                f"**{preset.scale}**",
                HOW,
                markdown(heads, lines),
                f"The runs are `results/{FOLDER / preset.name}/*-lr<rate>.json`.",
                *conditions.origin(used, f"python launch/reproduce.py tune --preset {preset.name} --data_dir DATA"),
            ]
        )
        + "\n"
    )
