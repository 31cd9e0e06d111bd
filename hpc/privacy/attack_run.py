"""One attack on the recordings of one run, scored."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
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
from hpc.privacy.scores.interval import Score, Statistics, share
from hpc.privacy.scores.table import Scorer
from hpc.privacy.seen import Rows, Sample


def attack_runs(run_folder: Path, several: Sequence[AttackConfig]) -> Iterator[AttackResult]:
    """Several attacks on one run, for which the public weights are loaded once; raises as `attack_run` does."""
    public = PublicModel.of(config_of(run_folder))
    return (attack_run(run_folder, options, public) for options in several)


def attack_run(run_folder: Path, options: AttackConfig, public: PublicModel | None = None) -> AttackResult:
    """Attack what `run_folder` holds of the victim. `public`: the run's, where it is loaded already.

    Raises `ConfigError` for an unknown method, or one that lacks its colluder, and `DataError` for a folder without
    the recordings it needs, or shadow data that overlaps the victim's.
    """
    method, config = method_of(options.method), config_of(run_folder)
    runner = method.runner()
    everything = recorded.load(run_folder, options.victim)
    victim = recorded.first_rows(_from_step(everything, options.first_step), options.max_rows)
    shadow = _shadow(run_folder, options, method, config)
    refuse_overlap(options, _rows_of(shadow), _rows_of(everything))
    public = public or PublicModel.of(config)
    material = Material(
        config=config,
        options=options,
        run_folder=run_folder,
        public=public,
        seen=[sample.seen for sample in victim],
        shadow=shadow,
    )
    start = time.perf_counter()
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


def _from_step(samples: Sequence[Sample], first: int) -> list[Sample]:
    late = [sample for sample in samples if sample.seen.step >= first]
    if not late:
        raise DataError(
            f"--attack.first_step {first}: the last step that was recorded of client {samples[-1].seen.client_id} is "
            f"{samples[-1].seen.step}; name an earlier one, or record more with --privacy.record_steps"
        )
    return late


def refuse_overlap(options: AttackConfig, shadow: Rows, victim: Rows) -> None:
    """Raise `DataError` if the colluder has any row of the victim's: then nothing would be recovered, but known."""
    rows = set(map(tuple, victim))
    shared = sum(tuple(row) in rows for row in shadow)
    if shared:
        raise DataError(
            f"{shared} of the {len(shadow)} rows of client {options.colluder} are also client {options.victim}'s (the "
            "same token ids): shadow data must be the colluder's own; take a run whose clients have different data, or "
            "give another --attack.colluder"
        )


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
        guesses = _checked(found.guesses, victim)
        scores |= text_scores(guesses, _rows_of(victim), _rows_of(shadow), public, options)
    if found.labels is not None:
        scores["label_accuracy"] = _label_accuracy(found.labels, victim, shadow, options.seed)
    if found.label_places is not None:
        scores["label_places"] = _label_places(found.label_places, victim, options.seed)
    return scores


def text_scores(
    guesses: Rows, truth: Rows, others: Rows, public: PublicModel, options: AttackConfig
) -> dict[str, Score]:
    """Every score of guessed token ids beside its floors. `others`: rows of another client, for these."""
    floors: dict[str, Rows] = {
        "unrelated": unrelated(truth, others, options.seed),
        "unigram": unigram(truth, others),
    }
    if options.lm_floor:
        floors["lm_only"] = lm_only(truth, public.whole, commonest(others or truth))
    scorer = Scorer(tokenizer=public.tokenizer, facts_of=facts_of(public.config), seed=options.seed)
    return scorer.scores(guesses, floors, truth)


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


def _label_places(places: Sequence[Sequence[tuple[int, int]]], victim: Sequence[Sample], seed: int) -> Score:
    """Label positions that were named, batch by batch; the floor names as many positions at random."""
    hits, chance = [], []
    for named, sample in zip(places, victim, strict=True):
        true = set(zip(sample.truth.label_rows, sample.truth.label_positions, strict=True))
        hits.append([len(true & set(named)), len(true)])
        chance.append([len(named) * len(true) / sum(sample.seen.lengths), len(true)])
    attack, floor = (
        Statistics(rows_RK=np.array(rows, dtype=np.float64), score=share).interval(seed) for rows in (hits, chance)
    )
    return Score(attack=attack, floors={"random": floor})
