"""Held-out answers decoded: compared token for token with the right ones, or as texts for the metrics.

Shape suffixes: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc.config import Config
from hpc.data.dataset import ClientData, EvalItem
from hpc.model.continued import ContinuedLM
from hpc.ragged import left_mask


def count_matches(model: ContinuedLM, items: Sequence[EvalItem], *, rows: int) -> int:
    """How many examples the model answers right when it decodes greedily, `rows` examples at a time.

    It is given as many tokens as the right answer has.
    """
    return sum(_matches(model, chunk) for chunk in _chunks(items, rows))


def matches_and_texts(
    model: ContinuedLM, items: Sequence[EvalItem], tokenizer: Any, *, rows: int, max_new_tokens: int
) -> tuple[int, list[str]]:
    """`count_matches`, and the model's own answer to each example, decoded once for both.

    An answer ends with the tokenizer's end of text, or after `max_new_tokens`; white space around it is taken off.
    """
    matched, texts = 0, list[str]()
    for chunk in _chunks(items, rows):
        gold = [item.choices[item.gold] for item in chunk]
        # What is compared with the right answer knows no end of text, so the texts end here.
        found = _decode(model, chunk, max(max_new_tokens, *map(len, gold)))
        matched += _count_equal(found, gold)
        texts += [_text(row[:max_new_tokens], tokenizer) for row in found]
    return matched, texts


@dataclass(kw_only=True, frozen=True)
class Decoded:
    """What came of decoding one client's held-out answers."""

    matched: int | None = None
    """How many are the right ones, token for token; none: nothing was decoded."""
    texts: list[str] | None = None
    """The answers themselves, where they are kept."""


def decode_held_out(model: ContinuedLM, data: ClientData, config: Config) -> Decoded:
    """One client's held-out answers, decoded as the configuration asks."""
    rows = config.train.eval_batch_size
    if not config.data.save_predictions:
        return Decoded(matched=count_matches(model, data.val_items, rows=rows))
    # Only texts are learnt with an end; after a label there is nothing to be read.
    longest = max((len(ids) for item in data.val_items for ids in item.choices), default=1)
    limit = longest if data.chooses else config.data.max_target_length
    matched, texts = matches_and_texts(model, data.val_items, data.tokenizer, rows=rows, max_new_tokens=limit)
    return Decoded(matched=matched, texts=texts)


def _matches(model: ContinuedLM, items: Sequence[EvalItem]) -> int:
    gold = [item.choices[item.gold] for item in items]
    return _count_equal(_decode(model, items, max(map(len, gold))), gold)


def _count_equal(found: Sequence[list[int]], gold: Sequence[list[int]]) -> int:
    return sum(row[: len(ids)] == ids for row, ids in zip(found, gold, strict=True))


def _text(ids: list[int], tokenizer: Any) -> str:
    kept = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
    return str(tokenizer.decode(kept, skip_special_tokens=True)).strip()


def _chunks(items: Sequence[EvalItem], rows: int) -> Iterator[Sequence[EvalItem]]:
    return (items[first : first + rows] for first in range(0, len(items), rows))


def _decode(model: ContinuedLM, items: Sequence[EvalItem], max_new_tokens: int) -> list[list[int]]:
    """The new ids of each row. No token ends it: rows are compared as far as the right answer goes."""
    mask_BT = left_mask([len(item.prompt) for item in items])
    ids_BT = torch.zeros_like(mask_BT)
    for row_T, item in zip(ids_BT, items, strict=True):
        row_T[len(row_T) - len(item.prompt) :] = torch.tensor(item.prompt)
    model.generation_config.eos_token_id = None
    found_BT: torch.Tensor = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )
    new: list[list[int]] = found_BT[:, mask_BT.shape[1] :].tolist()
    return new
