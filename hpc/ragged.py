"""Rows of different lengths: packed on the wire, right-padded in the model.

Shape suffixes: B rows, T longest row, S all tokens together, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def pack(padded_BTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Valid tokens only, row after row: `_SD`. No copy if no row is padded."""
    if all(length == padded_BTD.shape[1] for length in lengths):
        return padded_BTD.reshape(-1, padded_BTD.shape[-1])
    return torch.cat([row_TD[:length] for row_TD, length in zip(padded_BTD, lengths, strict=True)])


def pad(packed_SD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The inverse of `pack`, up to the values of padding, which become 0. No copy if all rows are as long."""
    longest = max(lengths, default=0)
    if all(length == longest for length in lengths):
        return packed_SD.reshape(len(lengths), longest, packed_SD.shape[-1])
    padded_BTD = packed_SD.new_zeros(len(lengths), longest, packed_SD.shape[-1])
    for row_TD, rows_TD in zip(padded_BTD, packed_SD.split(list(lengths)), strict=True):
        row_TD[: rows_TD.shape[0]] = rows_TD
    return padded_BTD


def split_rows(rows: int, pieces: int) -> list[int]:
    """Rows of each of `pieces` pieces, as even as can be, larger ones first."""
    each, more = divmod(rows, pieces)
    return [each + (piece < more) for piece in range(pieces)]


def left_mask(lengths: Sequence[int]) -> torch.Tensor:
    """`mask_BT` of left-padded rows, int64: 1 for a token, 0 for padding."""
    longest = max(lengths, default=0)
    return (torch.arange(longest)[None] >= longest - torch.tensor(list(lengths))[:, None]).long()


def pack_masked(padded_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The tokens that `mask_BT` marks, row after row: `_SD`. No copy if it marks all."""
    chosen_BT = mask_BT.bool()
    return padded_BTD.reshape(-1, padded_BTD.shape[-1]) if chosen_BT.all() else padded_BTD[chosen_BT]


def pad_masked(packed_SD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_masked`, up to the values of padding, which become 0."""
    chosen_BT = mask_BT.bool()
    if chosen_BT.all():
        return packed_SD.reshape(*mask_BT.shape, packed_SD.shape[-1])
    padded_BTD = packed_SD.new_zeros(*mask_BT.shape, packed_SD.shape[-1])
    padded_BTD[chosen_BT] = packed_SD
    return padded_BTD
