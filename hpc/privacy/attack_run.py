"""One attack on the recordings of one run, scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from hpc.cli import make_parser, parse
from hpc.config import Config
from hpc.errors import ConfigError, DataError
from hpc.privacy import recorded
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attack_result import AttackResult
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.attacks.registry import Found, Guesses, Material, Method, method_of
from hpc.privacy.scores.facts import facts_of
from hpc.privacy.scores.floors import commonest, lm_only, unigram, unrelated
from hpc.privacy.scores.interval import Statistics, share
from hpc.privacy.scores.table import Score, Scorer
from hpc.privacy.seen import Rows, Sample


def attack_run(run_folder: Path, options: AttackConfig) -> AttackResult:
    """Attack what `run_folder` holds of the victim.

    Raises `ConfigError` for an unknown method, or one that lacks its colluder, and `DataError` for a folder without
    the recordings it needs, or shadow data that overlaps the victim's.
    """
    method, config = method_of(options.method), config_of(run_folder)
    everything = recorded.load(run_folder, options.victim)
    victim = recorded.first_rows(_from_step(everything, options), options.max_rows)
    shadow = _shadow(run_folder, options, method, config)
    refuse_overlap(options, shadow, everything)
    public = PublicModel.of(config)
    material = Material(
        config=config,
        options=options,
        run_folder=run_folder,
        public=public,
        seen=[sample.seen for sample in victim],
        shadow=shadow,
    )
    runner, start = method.runner(), time.perf_counter()
    found = runner(material)
    seconds = time.perf_counter() - start
    truth = _rows_of(victim)
    return AttackResult(
        method=options.method,
        options=options,
        config=config,
        rows=len(truth),
        tokens=sum(map(len, truth)),
        shadow_rows=len(_rows_of(shadow)),
        steps=(victim[0].seen.step, victim[-1].seen.step),
        seconds=seconds,
        scores=_scores(found, victim, shadow, public, options),
        figures=found.figures,
    )


def config_of(run_folder: Path) -> Config:
    """What the run was. Raises `DataError` for a folder that is none's, `ConfigError` for a broken `config.yaml`."""
    path = run_folder / "config.yaml"
    if not path.is_file():
        raise DataError(
            f"{run_folder} has no config.yaml, so it is no run's folder; give the --run.output_dir of a run"
        )
    return parse(make_parser(""), ["--config", str(path)])[0]


def refuse_overlap(options: AttackConfig, shadow: Sequence[Sample], victim: Sequence[Sample]) -> None:
    """Raise `DataError` if the colluder has any row of the victim's: then nothing would be recovered, but known."""
    rows = set(_rows_of(victim))
    shared = sum(row in rows for row in _rows_of(shadow))
    if shared:
        raise DataError(
            f"{shared} of the {len(_rows_of(shadow))} recorded rows of client {options.colluder} are also client "
            f"{options.victim}'s (the same token ids): shadow data must be the colluder's own; record a run whose "
            "clients have different data, or give another --attack.colluder"
        )


def _from_step(samples: Sequence[Sample], options: AttackConfig) -> list[Sample]:
    found = [sample for sample in samples if sample.seen.step >= options.first_step]
    if not found:
        raise DataError(
            f"--attack.first_step {options.first_step}: the last step of client {options.victim} that was recorded is "
            f"{samples[-1].seen.step}; record more with --privacy.record_steps"
        )
    return found


def _shadow(run_folder: Path, options: AttackConfig, method: Method, config: Config) -> list[Sample]:
    """The colluder's recordings; where nobody has to collude, a run without that client is no mistake."""
    colluder = options.colluder
    if colluder is None or (colluder >= config.train.clients and not method.needs_shadow):
        if method.needs_shadow:
            raise ConfigError(
                f"--attack.method {options.method} learns from a colluding client; give --attack.colluder"
            )
        return []
    return recorded.first_rows(recorded.load(run_folder, colluder), options.max_shadow_rows)


def _rows_of(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [row for sample in samples for row in sample.truth.ids]


def _scores(
    found: Found, victim: Sequence[Sample], shadow: Sequence[Sample], public: PublicModel, options: AttackConfig
) -> dict[str, Score]:
    scores: dict[str, Score] = {}
    if found.guesses is not None:
        truth, others = _rows_of(victim), _rows_of(shadow)
        floors: dict[str, Rows] = {
            "unrelated": unrelated(truth, others, options.seed),
            "unigram": unigram(truth, others),
        }
        if options.lm_floor:
            floors["lm_only"] = lm_only(truth, public.whole, commonest(others or truth))
        scorer = Scorer(tokenizer=public.tokenizer, facts_of=facts_of(public.config), seed=options.seed)
        scores |= scorer.scores(_checked(found.guesses, victim), floors, truth)
    if found.labels is not None:
        scores["label_accuracy"] = _label_accuracy(found.labels, victim, shadow, options.seed)
    return scores


def _checked(guesses: Guesses, victim: Sequence[Sample]) -> Rows:
    """Row by row; what has another form than the victim's batches is a mistake of the method."""
    lengths = [[len(row) for row in batch] for batch in guesses]
    assert lengths == [list(sample.seen.lengths) for sample in victim], "guesses of other rows than were seen"
    return list(chain.from_iterable(guesses))


def _label_accuracy(
    labels: Sequence[Sequence[int]], victim: Sequence[Sample], shadow: Sequence[Sample], seed: int
) -> Score:
    """Label tokens that are right, batch by batch; the floor names the commonest label everywhere."""
    truth = [sample.truth.label_ids for sample in victim]
    token = commonest([sample.truth.label_ids for sample in shadow] or truth)
    columns = {"attack": labels, "unigram": [[token] * len(ids) for ids in truth]}
    intervals = {}
    for name, column in columns.items():
        pairs = [(list(guess), list(true)) for guess, true in zip(column, truth, strict=True)]
        hits = [[sum(a == b for a, b in zip(*pair, strict=True)), len(pair[1])] for pair in pairs]
        intervals[name] = Statistics(rows_RK=np.array(hits, dtype=np.float64), score=share).interval(seed)
    return Score(attack=intervals.pop("attack"), floors=intervals)
