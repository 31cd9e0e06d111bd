"""What a server sees of a client of the tiny model, and the truth of it, made with plain calls of the parts.

Each client has its own text and its own head: public weights with LoRA factors of its own, as if it had been trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.learner import tail_loss_sum
from hpc.model.build import ModelBuilder
from hpc.model.part import LabelPositions, Part
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.seen import Sample, Seen, Truth
from hpc.ragged import pack

VICTIM, COLLUDER = 0, 1


@dataclass(kw_only=True, frozen=True)
class Public:
    """What everybody has of the model: published weights, no adapter."""

    embedding_VD: torch.Tensor
    head: Part
    tail: Part


def config(*, head_blocks: int = 1, tail_blocks: int = 1, rows: int = 4, name: str = "tiny-llama") -> Config:
    return Config(
        model=ModelConfig(name_or_path=name, head_blocks=head_blocks, tail_blocks=tail_blocks),
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=64, val_examples=0),
        train=TrainConfig(clients=2, per_client_batch_size=rows, max_steps=1),
    )


def public(settings: Config) -> Public:
    builder = ModelBuilder.of(settings)
    head, tail = builder.client_parts(adapted=False)
    for part in (head, tail):
        part.eval().requires_grad_(False)
    return Public(embedding_VD=head.model.get_input_embeddings().weight.detach().float(), head=head, tail=tail)


def samples(settings: Config, client: int, batches: int, *, drift: float = 0.01) -> list[Sample]:
    """The first batches of a client; `drift`: standard deviation of its LoRA factors B, which start from 0."""
    builder = ModelBuilder.of(settings)
    head, tail = builder.client_parts()
    generator = torch.Generator().manual_seed(client)
    with torch.no_grad():
        for part in (head, tail):
            for name, parameter in part.trainable().items():
                if ".lora_B" in name:
                    parameter.normal_(0, drift, generator=generator)
    trunk = builder.part("trunk", adapted=False).requires_grad_(False)
    data = load_client_data(settings, client, load_tokenizer(builder.resolver))
    return [_sample(head, trunk, tail, client, step, data.train_batch(step)) for step in range(batches)]


def _sample(head: Part, trunk: Part, tail: Part, client: int, step: int, batch) -> Sample:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        smashed_BTD = head(batch.ids_BT)
        trunk_out_BTD = trunk(smashed_BTD)
    trunk_out_BTD.requires_grad_()
    labels = LabelPositions(row_L=batch.label_rows_L, position_L=batch.label_positions_L)
    (tail_loss_sum(tail, trunk_out_BTD, labels, batch.label_ids_L) / batch.label_tokens).backward()
    assert trunk_out_BTD.grad is not None
    return Sample(
        seen=Seen(
            client_id=client,
            step=step,
            lengths=batch.lengths,
            smashed_SD=pack(smashed_BTD, batch.lengths),
            grad_trunk_out_SD=pack(trunk_out_BTD.grad, batch.lengths),
            trunk_out_SD=pack(trunk_out_BTD.detach(), batch.lengths),
            label_tokens=batch.label_tokens,
        ),
        truth=Truth(
            ids=tuple(tuple(row[:n].tolist()) for row, n in zip(batch.ids_BT, batch.lengths, strict=True)),
            label_rows=tuple(batch.label_rows_L.tolist()),
            label_positions=tuple(batch.label_positions_L.tolist()),
            label_ids=tuple(batch.label_ids_L.tolist()),
        ),
    )


def shuffled(seen: Seen) -> Seen:
    """The same activations in an order that has nothing to do with the text: any attack falls to its floor."""
    order = torch.randperm(len(seen.smashed_SD), generator=torch.Generator().manual_seed(0))
    return replace(seen, smashed_SD=seen.smashed_SD[order])


def token_accuracy(guesses: Sequence[Sequence[Sequence[int]]], victims: Sequence[Sample]) -> float:
    pairs = [
        (guess, true)
        for rows, sample in zip(guesses, victims, strict=True)
        for row, truth in zip(rows, sample.truth.ids, strict=True)
        for guess, true in zip(row, truth, strict=True)
    ]
    return sum(guess == true for guess, true in pairs) / len(pairs)


def unigram_accuracy(shadow: Sequence[Sample], victims: Sequence[Sample]) -> float:
    """The floor: the most frequent token of other text, everywhere."""
    known = torch.tensor([i for sample in shadow for row in sample.truth.ids for i in row])
    commonest = int(known.bincount().argmax())
    guesses = [[[commonest] * len(row) for row in sample.truth.ids] for sample in victims]
    return token_accuracy(guesses, victims)
