"""The gradient at the trunk's output gives labels away: where they are, and which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpc.errors import DataError
from hpc.privacy.attack_options import LabelOptions
from hpc.privacy.attacks.label_inference import LabelGuess, infer_labels, label_positions
from hpc.privacy.seen import Sample
from tests.unit.learned_case import VICTIM, config, public, samples


def labels(found: LabelGuess) -> list[tuple[int, int, int]]:
    return list(zip(found.rows, found.positions, found.ids, strict=True))


def true_labels(sample: Sample) -> list[tuple[int, int, int]]:
    truth = sample.truth
    return list(zip(truth.label_rows, truth.label_positions, truth.label_ids, strict=True))


@pytest.mark.parametrize("tail_blocks", [0, 1])
def test_every_label_and_its_place_are_found_among_the_whole_vocabulary(tail_blocks: int) -> None:
    settings = config(tail_blocks=tail_blocks)
    sample = samples(settings, VICTIM, 1, drift=0.05)[0]  # the victim's own tail is not the public one
    (found,) = infer_labels([sample.seen], tail=public(settings).tail, options=LabelOptions())
    assert labels(found) == true_labels(sample)


def test_a_gradient_of_noise_tells_no_label() -> None:
    settings = config()
    sample = samples(settings, VICTIM, 1)[0]
    assert sample.seen.grad_trunk_out_SD is not None
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(sample.seen.grad_trunk_out_SD.shape, generator=draw)
    (found,) = infer_labels(
        [replace(sample.seen, grad_trunk_out_SD=noise)],
        tail=public(settings).tail,
        options=LabelOptions(candidates=sorted(set(sample.truth.label_ids))),
    )
    assert not set(labels(found)) & set(true_labels(sample))


def test_where_norms_fall_at_once_labels_end() -> None:
    norms = torch.tensor([0.01, 0.02, 5.0, 0.03, 4.0, 0.0, 0.0])
    assert label_positions(norms, gap=3.0) == [2, 4]
    assert label_positions(norms.clamp(max=0.04), gap=3.0) == [4], "only the last is sure"
    assert label_positions(torch.zeros(3), gap=3.0) == []


def test_an_evaluation_has_no_gradient_and_it_says_so() -> None:
    settings = config()
    sample = samples(settings, VICTIM, 1)[0]
    with pytest.raises(DataError, match="no gradient"):
        infer_labels([replace(sample.seen, grad_trunk_out_SD=None)], tail=public(settings).tail, options=LabelOptions())
