"""From runs' files to the rows of table 3: what each attack recovered under a cut and a defence, and what that cost.

Pure. A row is one run; seeds stand beside each other, as each has another victim's text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpc.metrics.table import UNPARSED
from hpc.privacy.scores.interval import Interval, Score
from hpc.reproduce.attack_plan import attack_jobs, variant_of
from hpc.reproduce.preset import Attacks, Preset
from hpc.reproduce.rows import Runs

TOKENS = "token_accuracy"


@dataclass(kw_only=True, frozen=True)
class Attacked:
    """One run and all attacks on it."""

    task: str
    seed: int
    head_blocks: int
    defence: str
    run: str
    metric: str
    """Name of the task's main metric."""
    utility: float
    """That metric on held-out examples, in percent."""
    eval_loss: float
    """Nats a label token."""
    epsilon: float | None
    """Of the run's noise; none without a guarantee."""
    victim_rows: int
    victim_tokens: int
    steps: tuple[int, int]
    """First and last step in which these were sent, from 0."""
    scores: Mapping[str, Mapping[str, Score]]
    """Attack → score → value. Attacks on labels have other scores than those on text."""
    figures: Mapping[str, Mapping[str, float]]
    """Attack → further numbers."""

    def leak(self) -> tuple[str, Interval] | None:
        """The attack that recovers most tokens, and how many."""
        known = {name: scores[TOKENS].attack for name, scores in self.scores.items() if TOKENS in scores}
        return max(known.items(), key=lambda each: each[1].value) if known else None

    def floor(self, score: str) -> tuple[str, Interval] | None:
        """The best of those who saw nothing; they are the same beside every attack."""
        known = next((scores[score].floors for scores in self.scores.values() if score in scores), {})
        return max(known.items(), key=lambda each: each[1].value) if known else None


def attacked_rows(preset: Preset, runs: Runs) -> list[Attacked]:
    """Those that are there, in the preset's order of tasks, cuts and defences."""
    attacks = preset.attacks
    if attacks is None:
        return []
    seeds = sorted({*preset.seeds, *(int(raw["seed"]) for raw in runs.values())})
    jobs = {(job.task, job.seed, job.variant): job for job in attack_jobs(preset, seeds=seeds)}
    return [
        _row(runs[job.name], task, seed, blocks, defence)
        for task, seed, blocks, defence, variant in _places(attacks, seeds)
        if (job := jobs[task, seed, variant]).name in runs
    ]


def _places(attacks: Attacks, seeds: Sequence[int]) -> list[tuple[str, int, int, str, str]]:
    return [
        (task, seed, blocks, defence, variant_of(blocks, defence))
        for task in attacks.tasks
        for seed in seeds
        for blocks in attacks.cuts
        for defence in attacks.defences
    ]


def _row(raw: Mapping[str, Any], task: str, seed: int, blocks: int, defence: str) -> Attacked:
    metrics = {name: value for name, value in raw["metrics"].items() if name != UNPARSED}
    metric = next(iter(metrics))
    attacks, first = raw["attacks"], next(iter(raw["attacks"].values()))
    return Attacked(
        task=task,
        seed=seed,
        head_blocks=blocks,
        defence=defence,
        run=raw["job"],
        metric=metric,
        utility=metrics[metric],
        eval_loss=raw["eval_loss"],
        epsilon=(raw.get("privacy") or {}).get("epsilon"),
        victim_rows=first["rows"],
        victim_tokens=first["tokens"],
        steps=(first["steps"][0], first["steps"][1]),
        scores={
            method: {name: _score(each) for name, each in found["scores"].items()} for method, found in attacks.items()
        },
        figures={method: found["figures"] for method, found in attacks.items()},
    )


def _score(content: Mapping[str, Any]) -> Score:
    return Score(
        attack=_interval(content["attack"]),
        floors={name: _interval(each) for name, each in content["floors"].items()},
    )


def _interval(content: Mapping[str, float]) -> Interval:
    return Interval(value=content["value"], low=content["low"], high=content["high"])
