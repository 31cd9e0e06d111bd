"""Held-out answers decoded, and compared token for token with the right ones.

Shape suffixes: B rows, T columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpc.data.dataset import EvalItem
from hpc.model.continued import ContinuedLM
from hpc.ragged import left_mask


def count_matches(model: ContinuedLM, items: Sequence[EvalItem], *, rows: int) -> int:
    """How many examples the model answers right when it decodes greedily, `rows` examples at a time.

    It is given as many tokens as the right answer has.
    """
    chunks = [items[first : first + rows] for first in range(0, len(items), rows)]
    return sum(_matches(model, chunk) for chunk in chunks)


def _matches(model: ContinuedLM, items: Sequence[EvalItem]) -> int:
    gold = [item.choices[item.gold] for item in items]
    mask_BT = left_mask([len(item.prompt) for item in items])
    ids_BT = torch.zeros_like(mask_BT)
    for row_T, item in zip(ids_BT, items, strict=True):
        row_T[len(row_T) - len(item.prompt) :] = torch.tensor(item.prompt)
    longest = max(map(len, gold))
    model.generation_config.eos_token_id = None  # rows are compared as far as the right answer goes
    found_BT = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        max_new_tokens=longest,
        do_sample=False,
        num_beams=1,
        pad_token_id=0,
    )[:, mask_BT.shape[1] :].tolist()
    return sum(row[: len(ids)] == ids for row, ids in zip(found_BT, gold, strict=True))
