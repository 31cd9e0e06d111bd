"""One client's data: its share loaded and tokenised once, training batches by step number, and evaluation.

Shape suffixes: E examples, C choices (verbalisers), L label positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.functional import one_hot

from hpc.config import Config, DataConfig
from hpc.data import seeding
from hpc.data.collate import Batch, Row, answer_ids, collate, make_row, pad_rows, prompt_ids
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.tasks import Example


@dataclass(kw_only=True, frozen=True)
class EvalBatch(Batch):
    """Held-out examples to score, in one of two layouts.

    Where every verbaliser is one token: a row is a prompt, its one label position is the prompt's last token, its
    label id the right verbaliser. Otherwise an example has C rows, the prompt with each of the verbalisers.
    """

    gold: tuple[int, ...]
    """Index of the right verbaliser of each example."""
    choice_ids_EC: torch.Tensor | None
    """int64, the verbalisers' ids in the first layout; none in the second."""


@dataclass(kw_only=True, frozen=True)
class EvalItem:
    """A tokenised held-out example: its prompt and its verbalisers."""

    prompt: list[int]
    choices: list[list[int]]
    gold: int


@dataclass(kw_only=True, frozen=True)
class ClientData:
    """The tokenised share of one client."""

    client_id: int
    seed: int
    per_client_batch_size: int
    train_rows: list[Row]
    val: list[Example]
    val_items: list[EvalItem]

    def train_batch(self, step: int) -> Batch:
        """The client's `step`-th batch (from 0), always of `per_client_batch_size` rows.

        A pure function of (seed, client_id, step): the batches walk through one permutation of the rows after
        another, and a batch that begins at the end of one goes on into the next.
        """
        return collate([self.train_rows[row] for row in self.row_numbers(step)])

    def row_numbers(self, step: int) -> list[int]:
        """Which of the training rows make up the `step`-th batch."""
        n = len(self.train_rows)
        first = step * self.per_client_batch_size
        places = [divmod(place, n) for place in range(first, first + self.per_client_batch_size)]
        return [epoch_order(self.seed, self.client_id, e, n)[place] for e, place in places]

    def eval_batches(self, batch_size: int) -> list[EvalBatch]:
        """The held-out examples in order, at most `batch_size` rows a batch, but never less than one example."""
        one_token = all(len(ids) == 1 for item in self.val_items for ids in item.choices)
        rows_each = 1 if one_token or not self.val_items else len(self.val_items[0].choices)
        size = max(1, batch_size // rows_each)
        chunks = [self.val_items[first : first + size] for first in range(0, len(self.val_items), size)]
        return [_one_token_batch(chunk) if one_token else _row_each_batch(chunk) for chunk in chunks]


@lru_cache(maxsize=64)
def epoch_order(seed: int, client_id: int, epoch: int, n: int) -> tuple[int, ...]:
    """The order of a client's `n` rows in one epoch."""
    return tuple(seeding.permutation(seeding.stream(seed, "order", client_id, epoch), n))


def _one_token_batch(items: list[EvalItem]) -> EvalBatch:
    lengths = tuple(len(item.prompt) for item in items)
    return EvalBatch(
        ids_BT=pad_rows([item.prompt for item in items]),
        lengths=lengths,
        label_rows_L=torch.arange(len(items)),
        label_positions_L=torch.tensor(lengths, dtype=torch.int64) - 1,
        label_ids_L=torch.tensor([item.choices[item.gold][0] for item in items], dtype=torch.int64),
        gold=tuple(item.gold for item in items),
        choice_ids_EC=torch.tensor([[ids[0] for ids in item.choices] for item in items], dtype=torch.int64),
    )


def _row_each_batch(items: list[EvalItem]) -> EvalBatch:
    rows = [Row(ids=item.prompt + ids, prompt_len=len(item.prompt)) for item in items for ids in item.choices]
    return EvalBatch(**vars(collate(rows)), gold=tuple(item.gold for item in items), choice_ids_EC=None)


@dataclass(kw_only=True, frozen=True)
class Score:
    """What a model made of held-out examples."""

    correct: int
    total: int
    predictions: tuple[int, ...]
    """Index of the verbaliser chosen in each example: that of the greatest log-probability, summed over its tokens."""
    loss_sum: float
    """Cross-entropy over the whole vocabulary (nats), summed over the right verbalisers' tokens."""
    label_tokens: int
    """Tokens of the right verbalisers."""


def score_eval(batch: EvalBatch, logits_LV: torch.Tensor) -> Score:
    """The score of `batch` from the logits at its label positions; computed in float32."""
    logprobs_L = logits_LV.float().log_softmax(-1).gather(1, batch.label_ids_L[:, None])[:, 0]
    if batch.choice_ids_EC is not None:
        scores_EC = logits_LV.gather(1, batch.choice_ids_EC)
    else:
        scores_B = torch.zeros(len(batch.lengths)).index_add(0, batch.label_rows_L, logprobs_L)
        scores_EC = scores_B.view(len(batch.gold), -1)
        # Rows of wrong verbalisers are there to be compared with; their loss says nothing about learning.
        right_EC = one_hot(torch.tensor(batch.gold), scores_EC.shape[1]).bool()
        logprobs_L = logprobs_L[right_EC.flatten()[batch.label_rows_L]]
    predictions = tuple(scores_EC.argmax(dim=1).tolist())
    return Score(
        correct=sum(predicted == gold for predicted, gold in zip(predictions, batch.gold, strict=True)),
        total=len(batch.gold),
        predictions=predictions,
        loss_sum=-float(logprobs_L.sum()),
        label_tokens=len(logprobs_L),
    )


def load_client_data(config: Config, client_id: int, tokenizer: Any) -> ClientData:
    """Read, deal and tokenise what client `client_id` (from 0) owns.

    Raises `DataError` for broken files, for a client without examples, and for prompts or answers that do not fit.
    """
    data = config.data
    lengths = {"max_source_length": data.max_source_length, "max_target_length": data.max_target_length}
    val = held_out_examples(config, client_id)
    return ClientData(
        client_id=client_id,
        seed=config.train.seed,
        per_client_batch_size=config.train.per_client_batch_size,
        train_rows=[make_row(example, tokenizer, **lengths) for example in training_examples(config, client_id)],
        val=val,
        val_items=[_eval_item(example, tokenizer, data) for example in val],
    )


def _eval_item(example: Example, tokenizer: Any, data: DataConfig) -> EvalItem:
    return EvalItem(
        prompt=prompt_ids(example, tokenizer, data.max_source_length),
        choices=[answer_ids(example, text, tokenizer, data.max_target_length) for text in example.verbalisers],
        gold=example.label,
    )
