"""An inverter that learns from a colluding client reads another client's text out of its activations."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpc.errors import DataError
from hpc.privacy.attack_options import InverterOptions
from hpc.privacy.attacks.inverter import invert_by_learning
from hpc.privacy.seen import Sample
from tests.unit.learned_case import (
    COLLUDER,
    VICTIM,
    config,
    public,
    samples,
    shuffled,
    token_accuracy,
    unigram_accuracy,
)

SMALL = InverterOptions(hidden=32, epochs=4, learning_rate=5e-3)
SETTINGS = config(head_blocks=2)
EMBEDDING_VD = public(SETTINGS).embedding_VD


@pytest.fixture(scope="module")
def victim() -> list[Sample]:
    return samples(SETTINGS, VICTIM, 1)


@pytest.fixture(scope="module")
def shadow() -> list[Sample]:
    return samples(SETTINGS, COLLUDER, 3)


def accuracy(victim: list[Sample], shadow: list[Sample], options: InverterOptions) -> float:
    guesses = invert_by_learning(
        [sample.seen for sample in victim], shadow=shadow, embedding_VD=EMBEDDING_VD, options=options
    )
    return token_accuracy(guesses, victim)


@pytest.mark.parametrize("architecture", ["gru", "transformer"])
def test_it_reads_most_of_the_victims_text_behind_two_blocks(
    architecture: str, victim: list[Sample], shadow: list[Sample]
) -> None:
    untrained = accuracy(victim, shadow, replace(SMALL, architecture=architecture, epochs=0))
    trained = accuracy(victim, shadow, replace(SMALL, architecture=architecture))
    assert trained > 0.8 > untrained + 0.4
    assert trained > unigram_accuracy(shadow, victim) + 0.5


def test_without_blocks_it_is_right_before_it_has_learned_anything() -> None:
    embedded = config(head_blocks=0)
    victim, shadow = samples(embedded, VICTIM, 1), samples(embedded, COLLUDER, 1)
    assert accuracy(victim, shadow, replace(SMALL, epochs=0)) == 1.0


def test_activations_out_of_order_tell_nothing(victim: list[Sample], shadow: list[Sample]) -> None:
    mixed = [replace(sample, seen=shuffled(sample.seen)) for sample in victim]
    options = replace(SMALL, architecture="transformer")
    assert accuracy(mixed, shadow, options) < unigram_accuracy(shadow, victim) + 0.05


@pytest.mark.long
def test_an_output_layer_of_its_own_learns_too(victim: list[Sample], shadow: list[Sample]) -> None:
    options = replace(SMALL, architecture="transformer", output="own", negatives=0)
    assert accuracy(victim, shadow, options) > unigram_accuracy(shadow, victim) + 0.1


def test_the_published_target_reads_far_less_than_the_right_one(victim: list[Sample], shadow: list[Sample]) -> None:
    options = replace(SMALL, architecture="transformer")
    published = accuracy(victim, shadow, replace(options, target="next"))
    assert published < accuracy(victim, shadow, options) - 0.3


def test_a_seed_decides_everything_and_leaves_no_trace(victim: list[Sample], shadow: list[Sample]) -> None:
    import torch

    options = replace(SMALL, architecture="transformer", epochs=1)
    seen = [sample.seen for sample in victim]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = invert_by_learning(seen, shadow=shadow, embedding_VD=EMBEDDING_VD, options=options)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert invert_by_learning(seen, shadow=shadow, embedding_VD=EMBEDDING_VD, options=options) == first


def test_without_a_colluder_it_says_what_is_missing(victim: list[Sample]) -> None:
    with pytest.raises(DataError, match="colluding client"):
        invert_by_learning([victim[0].seen], shadow=[], embedding_VD=EMBEDDING_VD, options=SMALL)
