"""One client's data: its share loaded and tokenised once, training batches by step number, and evaluation.

Shape suffixes: B rows, E examples, C choices (of the example that has most), L label positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hpc.config import MAX_ROWS, Config
from hpc.data import seeding
from hpc.data.chat import require_chat_template
from hpc.data.collate import Batch, collate, pad_rows
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.rows import Encoder, Row
from hpc.data.tasks import Example
from hpc.errors import DataError

MAX_CHOICES = MAX_ROWS // 3  # a header has room for so many rows and their layouts


@dataclass(kw_only=True, frozen=True)
class EvalBatch(Batch):
    """Held-out examples to score, in one of two layouts.

    Where every choice is one token, and all examples have as many: a row is a prompt, its one label position is the
    prompt's last token, its label id the right choice. Otherwise an example has a row for each of its choices: the
    prompt and the choice.
    """

    gold: tuple[int, ...]
    """Index of the right choice of each example (of the first right one)."""
    right: tuple[frozenset[int], ...]
    """Indices of all right choices of each example."""
    choices: tuple[int, ...]
    """How many choices each example has; a text to generate is the only one."""
    choice_ids_EC: torch.Tensor | None
    """int64, the choices' ids in the first layout; none in the second."""


@dataclass(kw_only=True, frozen=True)
class EvalItem:
    """A tokenised held-out example: its prompt and its choices (of a text to generate, the reference)."""

    prompt: list[int]
    choices: list[list[int]]
    gold: int
    right: frozenset[int] = frozenset()
    """All right choices, if there are more than `gold`."""

    @property
    def rows(self) -> int:
        """Rows in the layout that has one for each choice."""
        return len(self.choices)


@dataclass(kw_only=True, frozen=True)
class ClientData:
    """The tokenised share of one client."""

    client_id: int
    seed: int
    per_client_batch_size: int
    train_rows: list[Row]
    val: list[Example]
    val_items: list[EvalItem]
    tokenizer: Any = None
    """The one that made the rows; it turns what is decoded into text."""

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

    @property
    def chooses(self) -> bool:
        """Whether the held-out examples have choices; a text to generate is neither right nor wrong."""
        return all(example.kind != "text" for example in self.val)

    def eval_batches(self, batch_size: int) -> list[EvalBatch]:
        """The held-out examples in order, at most `batch_size` rows a batch, but never less than one example."""
        items = self.val_items
        one_token = len({item.rows for item in items}) == 1 and all(len(c) == 1 for i in items for c in i.choices)
        chunks = _chunks(items, [1 if one_token else item.rows for item in items], batch_size)
        return [_one_token_batch(chunk) if one_token else _row_each_batch(chunk) for chunk in chunks]


def _chunks(items: list[EvalItem], rows: list[int], batch_size: int) -> list[list[EvalItem]]:
    chunks: list[list[EvalItem]] = []
    room = 0
    for item, needed in zip(items, rows, strict=True):
        if not chunks or needed > room:
            chunks.append([])
            room = batch_size
        chunks[-1].append(item)
        room -= needed
    return chunks


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
        **_asked(items),
        choice_ids_EC=torch.tensor([[ids[0] for ids in item.choices] for item in items], dtype=torch.int64),
    )


def _row_each_batch(items: list[EvalItem]) -> EvalBatch:
    rows = [Row(ids=item.prompt + ids, prompt_len=len(item.prompt)) for item in items for ids in item.choices]
    return EvalBatch(**vars(collate(rows)), **_asked(items), choice_ids_EC=None)


def _asked(items: list[EvalItem]) -> dict[str, Any]:
    return {
        "gold": tuple(item.gold for item in items),
        "right": tuple(item.right or frozenset({item.gold}) for item in items),
        "choices": tuple(item.rows for item in items),
    }


@dataclass(kw_only=True, frozen=True)
class Score:
    """What a model made of held-out examples."""

    correct: int
    total: int
    predictions: tuple[int, ...]
    """Index of what is chosen in each example: the choice of the greatest log-probability, summed over its tokens."""
    loss_sum: float
    """Cross-entropy over the whole vocabulary (nats), summed over the right choices' tokens."""
    label_tokens: int
    """Tokens of the right choices (of the first one, where there are several)."""


def score_eval(batch: EvalBatch, logits_LV: torch.Tensor) -> Score:
    """The score of `batch` from the logits at its label positions; computed in float32."""
    logprobs_L = logits_LV.float().log_softmax(-1).gather(1, batch.label_ids_L[:, None])[:, 0]
    if batch.choice_ids_EC is not None:
        scores_EC = logits_LV.gather(1, batch.choice_ids_EC)
    else:
        scores_B = torch.zeros(len(batch.lengths)).index_add(0, batch.label_rows_L, logprobs_L)
        counts_E = torch.tensor(batch.choices)
        # Where an example has fewer choices than another, none of the missing ones is ever chosen.
        scores_EC = pad_sequence(list(scores_B.split(list(batch.choices))), batch_first=True, padding_value=-math.inf)
        # Rows of wrong choices are there to be compared with; their loss says nothing about learning.
        trained_B = torch.zeros(len(batch.lengths), dtype=torch.bool)
        trained_B[counts_E.cumsum(0) - counts_E + torch.tensor(batch.gold)] = True
        logprobs_L = logprobs_L[trained_B[batch.label_rows_L]]
    predictions = tuple(scores_EC.argmax(dim=1).tolist())
    return Score(
        correct=sum(predicted in right for predicted, right in zip(predictions, batch.right, strict=True)),
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
    encoder = Encoder(
        tokenizer=tokenizer,
        max_source_length=data.max_source_length,
        max_target_length=data.max_target_length,
        chat=data.chat_template,
    )
    if data.chat_template:
        require_chat_template(tokenizer)
    val = held_out_examples(config, client_id)
    return ClientData(
        client_id=client_id,
        seed=config.train.seed,
        per_client_batch_size=config.train.per_client_batch_size,
        train_rows=[encoder.row(example) for example in training_examples(config, client_id)],
        val=val,
        val_items=[_eval_item(example, encoder) for example in val],
        tokenizer=tokenizer,
    )


def _eval_item(example: Example, encoder: Encoder) -> EvalItem:
    if len(example.choices) > MAX_CHOICES:
        raise DataError(
            f"{example.where}: a held-out question has {len(example.choices)} candidates, more than the {MAX_CHOICES} "
            "that can be scored at once; shorten the list"
        )
    return EvalItem(
        prompt=encoder.prompt(example),
        choices=[encoder.answer(example, text) for text in example.choices],
        gold=example.label,
        right=frozenset(example.right),
    )
