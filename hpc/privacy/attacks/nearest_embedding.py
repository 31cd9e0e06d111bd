"""Attack (a): for each smashed row, the token whose public embedding lies nearest. Exact where the cut is at block 0.

Shape suffixes: S tokens of some rows, T tokens of one row, V vocabulary, D hidden size, K nearest few.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.seen import Seen

_TOKENS_AT_ONCE = 64  # times V distances: 12 MiB for 49,152 tokens
_NEAREST = 4  # of which the distance is worked out anew, as differences, without cancellation


def nearest_embedding(seen: Sequence[Seen], public: PublicModel) -> list[list[list[int]]]:
    """Guesses for each batch and row, by Euclidean distance. Raises as `PublicModel.offsets_TD` does."""
    entries_VD = public.entries_VD()
    longest = max((max(each.lengths) for each in seen), default=1)
    offsets_TD = public.offsets_TD(longest)
    if not offsets_TD.any():  # else each position would have clipped entries of its own
        entries_VD = public.as_sent(entries_VD)
    return [[_row(row_TD - offsets_TD[: len(row_TD)], entries_VD) for row_TD in each.rows_TD()] for each in seen]


def _row(row_TD: torch.Tensor, entries_VD: torch.Tensor) -> list[int]:
    return [int(id_) for rows_SD in row_TD.split(_TOKENS_AT_ONCE) for id_ in nearest(rows_SD, entries_VD)]


def nearest(rows_SD: torch.Tensor, table_VD: torch.Tensor) -> torch.Tensor:
    """`ids_S`: the nearest row of the table."""
    scores_SV = (table_VD.square().sum(1) / 2).sub(rows_SD @ table_VD.T)
    few_SK = scores_SV.topk(min(_NEAREST, len(table_VD)), largest=False).indices
    exact_SK = (table_VD[few_SK] - rows_SD[:, None]).square().sum(-1)
    return few_SK.gather(1, exact_SK.argmin(1, keepdim=True))[:, 0]
