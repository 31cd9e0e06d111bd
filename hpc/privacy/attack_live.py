"""Attack (e) from a configuration: a hostile server steers the training of one real client, then reads its text.

The victim is alone with it: a server that hijacks answers each client by itself, and need not add up gradients.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from hpc.config import Config
from hpc.data.collate import Batch
from hpc.data.dataset import ClientData, load_client_data
from hpc.errors import ConfigError
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy import recorded
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attack_result import AttackResult
from hpc.privacy.attack_run import refuse_overlap, text_scores
from hpc.privacy.attacks.fsha import Hijacker
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.duel import Duel, duel, orders_of
from hpc.privacy.scores.tokens import token_accuracy
from hpc.privacy.seen import Rows, Sample, Seen, Truth
from hpc.schedule import TrainStep

_PLAYED = ("serial", "client_batch", "replica")


def check_steered(config: Config, options: AttackConfig) -> None:
    """Raise `ConfigError` for a run in which no server can steer a head, or that this one cannot play."""
    if options.colluder is None:
        raise ConfigError(f"--attack.method {options.method} needs a server's own text; give --attack.colluder")
    if config.train.schedule not in _PLAYED:
        raise ConfigError(
            f"--attack.method {options.method} plays the server of --train.schedule {', '.join(_PLAYED)}, not of "
            f"{config.train.schedule}; choose one of these"
        )
    if config.train.secure_aggregation:
        raise ConfigError(
            f"--attack.method {options.method} plays the server of one client, and a sum over one cannot be masked; "
            "leave --train.secure_aggregation out (it does not hide the activations that are attacked)"
        )
    if not config.head_learns:
        raise ConfigError(
            f"--attack.method {options.method} steers what a client's head learns, and with --adapter.method "
            f"{config.adapter.method}, --model.head_blocks {config.model.head_blocks} and --adapter.parts "
            f"{','.join(config.adapter.parts)} it learns nothing; give it something to learn"
        )


def attack_live(config: Config, options: AttackConfig, folder: Path) -> AttackResult:
    """Steer the victim through all its steps, or until its detector ends them; score the last rows that were seen.

    Figures: `steps` that were served; `first_rows_token_accuracy` (percent), of the same final inverse on as many rows
    of the first steps, when the head was not steered yet; with a detector, `detector_noticed_at_step`, from 1 (0: it
    noticed nothing). Raises `ConfigError` as `check_steered`, `DataError` for a colluder with rows of the victim's.
    """
    check_steered(config, options)
    data, own_text = _client_data(config, options.victim), _own_text(config, options)
    refuse_overlap(options, own_text, [row.ids for row in data.train_rows])
    public, start = PublicModel.of(config), time.perf_counter()
    hijacker = Hijacker(own_text, embedding_VD=public.embedding_VD, options=options.fsha, seed=options.seed)
    orders = orders_of(config, options.victim)
    left = duel(config, folder, hijacker, orders, victim=options.victim, careful=options.fsha.careful)
    samples = _with_truth(left.trunk.seen, orders, data)
    last = last_rows(samples, options.max_rows)
    truth, guesses = _rows_of(last), _read(hijacker, last)
    seconds = time.perf_counter() - start
    return AttackResult(
        method=options.method,
        options=options,
        config=config,
        rows=len(truth),
        tokens=sum(map(len, truth)),
        shadow_rows=len(own_text),
        steps=(last[0].seen.step, last[-1].seen.step),
        seconds=seconds,
        scores=text_scores(guesses, truth, own_text, public, options),
        figures=_figures(left, hijacker, recorded.first_rows(samples, len(truth)), options.seed),
    )


def last_rows(samples: Sequence[Sample], rows: int) -> list[Sample]:
    """So many rows, of the last batches that have them; 0: all."""
    place, found = len(samples), 0
    while place and (not rows or found < rows):
        place -= 1
        found += len(samples[place].truth.ids)
    return recorded.first_rows(samples[place:], rows)


def truth_of(batch: Batch) -> Truth:
    """What is true of a batch of the victim's."""
    return Truth(
        ids=tuple(tuple(row_T[:n].tolist()) for row_T, n in zip(batch.ids_BT, batch.lengths, strict=True)),
        label_rows=tuple(batch.label_rows_L.tolist()),
        label_positions=tuple(batch.label_positions_L.tolist()),
        label_ids=tuple(batch.label_ids_L.tolist()),
    )


def _figures(left: Duel, hijacker: Hijacker, first: Sequence[Sample], seed: int) -> dict[str, float]:
    accuracy = token_accuracy(_read(hijacker, first), _rows_of(first)).interval(seed).value
    figures = {"steps": float(len(left.trunk.seen)), "first_rows_token_accuracy": accuracy}
    detector = left.client.side.detector
    if detector is not None:
        figures["detector_noticed_at_step"] = 0.0 if detector.noticed is None else detector.noticed + 1.0
    return figures


def _client_data(config: Config, client: int) -> ClientData:
    return load_client_data(config, client, load_tokenizer(ModelBuilder.of(config).resolver))


def _own_text(config: Config, options: AttackConfig) -> list[list[int]]:
    """The colluder's training rows, at most `max_shadow_rows`."""
    assert options.colluder is not None, "checked"
    rows = [row.ids for row in _client_data(config, options.colluder).train_rows]
    return rows[: options.max_shadow_rows or None]


def _with_truth(seen: Sequence[Seen], orders: Sequence[TrainStep], data: ClientData) -> list[Sample]:
    numbers = {order.step: order.batches[0] for order in orders}
    return [Sample(seen=each, truth=truth_of(data.train_batch(numbers[each.step]))) for each in seen]


def _rows_of(samples: Sequence[Sample]) -> Rows:
    return [row for sample in samples for row in sample.truth.ids]


def _read(hijacker: Hijacker, samples: Sequence[Sample]) -> Rows:
    return [row for batch in hijacker.invert([sample.seen for sample in samples]) for row in batch]
