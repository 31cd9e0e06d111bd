"""From prompts and answers to token rows, and from rows to right-padded batches with their label positions.

Shape suffixes: B rows, T longest row, L label positions (over all rows, row by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc.data.tasks import Example
from hpc.errors import DataError


@dataclass(kw_only=True, frozen=True)
class Row:
    """Token ids of a prompt and its answer; the first `prompt_len` are the prompt's (BOS included)."""

    ids: list[int]
    prompt_len: int


@dataclass(kw_only=True, frozen=True)
class Batch:
    """Rows side by side, and where the loss is.

    The hidden state at (row, position) predicts the label id, the token at position + 1. No other position has a
    loss, so these are all that the client tail needs. Padding is to the right of the valid tokens and never attended.
    """

    ids_BT: torch.Tensor
    """int64."""
    lengths: tuple[int, ...]
    """Valid tokens of each row."""
    label_rows_L: torch.Tensor
    """int64."""
    label_positions_L: torch.Tensor
    """int64."""
    label_ids_L: torch.Tensor
    """int64."""

    @property
    def label_tokens(self) -> int:
        """The weight of this batch in a mean over label tokens."""
        return len(self.label_ids_L)


def prompt_ids(example: Example, tokenizer: Any, max_source_length: int) -> list[int]:
    """At most `max_source_length` ids; a longer prompt loses the end of its passage, and nothing else.

    Raises `DataError` if the prompt is too long even without the passage.
    """
    whole = _encode_prompt(tokenizer, example.prompt())
    if len(whole) <= max_source_length:
        return whole
    kept = _encode_prompt(tokenizer, example.prompt(0))
    if len(kept) > max_source_length:
        raise DataError(
            f"a question takes {len(kept)} tokens with an empty passage, more than --data.max_source_length "
            f"{max_source_length}: raise it, or shorten {example.after.strip()!r:.80}"
        )
    # Bisection over characters works with every tokenizer, and `fits` is only ever a length that was tried.
    fits, too_long = 0, len(example.passage)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        ids = _encode_prompt(tokenizer, example.prompt(middle))
        if len(ids) <= max_source_length:
            fits, kept = middle, ids
        else:
            too_long = middle
    return kept


def _encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text at the start of a row: with BOS where the tokenizer adds one by default, never with EOS."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    if _ends_prompts(tokenizer):
        return list(tokenizer.build_inputs_with_special_tokens(ids))
    return [tokenizer.bos_token_id, *ids] if _adds_bos(tokenizer) else ids


def _ends_prompts(tokenizer: Any) -> bool:
    """Whether tokens of its own stand between a prompt and its answer (ChatGLM)."""
    return bool(getattr(tokenizer, "ends_prompts", False))


def _adds_bos(tokenizer: Any) -> bool:
    with_special, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    bos = tokenizer.bos_token_id
    return bos is not None and with_special[:1] == [bos] and plain[:1] != [bos]


def answer_ids(example: Example, answer: str, tokenizer: Any, max_target_length: int) -> list[int]:
    """Ids of an answer as the continuation of the prompt.

    SentencePiece puts a space mark in front of a text that stands alone, so the answer is tokenised behind the prompt
    and the prompt's ids are taken off; where the two merge into each other, it is tokenised alone after all.
    Raises `DataError` if it has no tokens or more than `max_target_length`.
    """
    ids = _continuation(example.after, answer, tokenizer)
    if not 0 < len(ids) <= max_target_length:
        raise DataError(
            f"the answer {answer!r} has {len(ids)} tokens; it must have 1 to --data.max_target_length "
            f"{max_target_length}"
        )
    return ids


def _continuation(before: str, answer: str, tokenizer: Any) -> list[int]:
    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if _ends_prompts(tokenizer):
        return encode(answer.strip())
    prompt, both = encode(before), encode(before + answer)
    return both[len(prompt) :] if both[: len(prompt)] == prompt else encode(answer)


def make_row(example: Example, tokenizer: Any, *, max_source_length: int, max_target_length: int) -> Row:
    """The prompt and its right answer. Raises `DataError` if either does not fit."""
    prompt = prompt_ids(example, tokenizer, max_source_length)
    return Row(ids=prompt + answer_ids(example, example.answer, tokenizer, max_target_length), prompt_len=len(prompt))


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int = 0) -> torch.Tensor:
    """`ids_BT`, right-padded. Any valid id will do for padding."""
    longest = max(len(ids) for ids in rows)
    return torch.tensor([[*ids, *[pad_id] * (longest - len(ids))] for ids in rows], dtype=torch.int64)


def collate(rows: Sequence[Row], pad_id: int = 0) -> Batch:
    """A batch whose labels are the answers' tokens."""
    labels = [
        (row, position, ids.ids[position + 1])
        for row, ids in enumerate(rows)
        for position in range(ids.prompt_len - 1, len(ids.ids) - 1)
    ]
    rows_L, positions_L, ids_L = torch.tensor(labels, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return Batch(
        ids_BT=pad_rows([row.ids for row in rows], pad_id),
        lengths=tuple(len(row.ids) for row in rows),
        label_rows_L=rows_L,
        label_positions_L=positions_L,
        label_ids_L=ids_L,
    )


def in_pieces(batch: Batch, sizes: Sequence[int]) -> list[Batch]:
    """The batch's rows in order as several batches of `sizes` rows, each as wide as its own longest row."""
    if len(sizes) == 1:
        return [batch]
    pieces, first = [], 0
    for size in sizes:
        lengths = batch.lengths[first : first + size]
        inside = (batch.label_rows_L >= first) & (batch.label_rows_L < first + size)
        pieces.append(
            Batch(
                ids_BT=batch.ids_BT[first : first + size, : max(lengths)],
                lengths=lengths,
                label_rows_L=batch.label_rows_L[inside] - first,
                label_positions_L=batch.label_positions_L[inside],
                label_ids_L=batch.label_ids_L[inside],
            )
        )
        first += size
    return pieces


def union(batches: Sequence[Batch]) -> Batch:
    """Several clients' batches as one, rows in the given order, padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    firsts = [sum(len(batch.lengths) for batch in batches[:index]) for index in range(len(batches))]
    rows = [
        row_T[:length].tolist() for batch in batches for row_T, length in zip(batch.ids_BT, batch.lengths, strict=True)
    ]
    return Batch(
        ids_BT=pad_rows(rows),
        lengths=tuple(length for batch in batches for length in batch.lengths),
        label_rows_L=torch.cat([b.label_rows_L + first for b, first in zip(batches, firsts, strict=True)]),
        label_positions_L=torch.cat([batch.label_positions_L for batch in batches]),
        label_ids_L=torch.cat([batch.label_ids_L for batch in batches]),
    )
