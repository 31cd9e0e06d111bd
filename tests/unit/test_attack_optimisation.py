"""Optimising embeddings through the public first blocks finds the victim's text, without anybody's data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpc.privacy.attack_options import OptimisationOptions
from hpc.privacy.attacks.optimisation import invert_by_optimising, nearest
from hpc.privacy.seen import Sample, Seen
from tests.unit.learned_case import COLLUDER, VICTIM, Public, config, public, samples, shuffled, token_accuracy
from tests.unit.learned_case import unigram_accuracy as floor

SMALL = OptimisationOptions(rounds=2, steps=15)


def accuracy(
    known: Public, victim: list[Sample], options: OptimisationOptions, seen: list[Seen] | None = None
) -> float:
    guesses = invert_by_optimising(
        seen or [sample.seen for sample in victim], embedding_VD=known.embedding_VD, head=known.head, options=options
    )
    return token_accuracy(guesses, victim)


@pytest.mark.parametrize(("head_blocks", "least"), [(0, 1.0), (1, 0.98), (2, 0.9)])
def test_it_finds_the_text_of_a_head_with_an_adapter_of_its_own(head_blocks: int, least: float) -> None:
    settings = config(head_blocks=head_blocks)
    victim, other = samples(settings, VICTIM, 1), samples(settings, COLLUDER, 1)
    assert accuracy(public(settings), victim, SMALL) >= least > floor(other, victim) + 0.5


def test_behind_two_blocks_optimising_is_what_finds_it() -> None:
    settings = config(head_blocks=2)
    known, victim = public(settings), samples(settings, VICTIM, 1)
    found = accuracy(known, victim, SMALL)
    assert found > accuracy(known, victim, replace(SMALL, rounds=0)) + 0.03
    assert accuracy(known, victim, replace(SMALL, warm_start_tokens=0)) < found


def test_activations_out_of_order_tell_nothing() -> None:
    settings = config(head_blocks=1)
    victim, other = samples(settings, VICTIM, 1), samples(settings, COLLUDER, 1)
    mixed = [shuffled(sample.seen) for sample in victim]
    assert accuracy(public(settings), victim, SMALL, mixed) < floor(other, victim) + 0.05


def test_nearest_is_the_least_euclidean_distance() -> None:
    points, table = torch.randn(7, 5), torch.randn(11, 5) * torch.rand(11, 1) * 3
    assert torch.equal(nearest(points, table, piece=3), torch.cdist(points, table).argmin(-1))
