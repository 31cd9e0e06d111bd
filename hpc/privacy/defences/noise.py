"""Clipping and Gaussian noise, row by row: what leaves a client instead of the exact values.

Clipping is part of the client head's graph, so its backward pass is that of the function that was computed. Both are
done in float32, and rounding to the precision of the wire comes last, where it can reveal nothing more.

Randomness: a stream of AES-256 in counter mode under a key that each process draws from the operating system. Never
from `train.seed`, which the server knows, and never from torch's generators: those of the CPU take a 32-bit seed, and a
server that knows one row (that of the first token, say) could try them all and take the noise off every other row.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import math
import os

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_FRACTION_BITS = 53  # of a float64


class FreshNoise:
    """Standard normal values that nobody else can draw again."""

    def __init__(self) -> None:
        self._stream = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()

    def like(self, values: torch.Tensor) -> torch.Tensor:
        """float32 of the shape and on the device of `values` (Box and Muller, 1958, in float64)."""
        pairs = -(-values.numel() // 2)
        radius = (-2 * self._uniform(pairs).log()).sqrt()
        angle = 2 * math.pi * self._uniform(pairs)
        normal = torch.cat([radius * angle.cos(), radius * angle.sin()])[: values.numel()]
        return normal.float().view(values.shape).to(values.device)

    def _uniform(self, count: int) -> torch.Tensor:
        """float64 in (0, 1]."""
        if not count:
            return torch.empty(0, dtype=torch.float64)
        drawn = torch.frombuffer(bytearray(self._stream.update(bytes(8 * count))), dtype=torch.int64)
        return (drawn.bitwise_and(2**_FRACTION_BITS - 1) + 1).double() * 2.0**-_FRACTION_BITS


def clip_rows(rows_BTD: torch.Tensor, norm: float) -> torch.Tensor:
    """Rows longer than `norm` (L2, over D) scaled down to it; float32, differentiable.

    A row with a value that is not finite becomes zeros: no scale shortens it and no noise hides it, and a server that
    chooses the scale of a gradient could otherwise read from what overflows how large each value is.
    """
    rows_BTD = rows_BTD.float()
    rows_BTD = torch.where(rows_BTD.isfinite().all(-1, keepdim=True), rows_BTD, 0.0)
    squares_BT1 = rows_BTD.square().sum(-1, keepdim=True)
    # Not a minimum with 1 of a quotient, whose gradient at a row of zeros is not a number.
    longer_BT1 = squares_BT1 > norm * norm
    scale_BT1 = torch.where(longer_BT1, norm * torch.where(longer_BT1, squares_BT1, 1.0).rsqrt(), 1.0)
    return rows_BTD * scale_BT1


def released(rows_BTD: torch.Tensor, source: FreshNoise, *, clip_norm: float, std: float) -> torch.Tensor:
    """The rows clipped (0: not) and with noise of this standard deviation (0: none), in their own precision."""
    if not clip_norm and not std:
        return rows_BTD
    kept_BTD = clip_rows(rows_BTD, clip_norm) if clip_norm else rows_BTD.float()
    if std:
        kept_BTD = kept_BTD + std * source.like(kept_BTD)
    return kept_BTD.to(rows_BTD.dtype)


def fedsea_std(noise_scale: float) -> float:
    """Standard deviation of FedSEA's noise for its scale."""
    return noise_scale * math.sqrt(math.pi / 2)


def equal_norms(grad_BTD: torch.Tensor, source: FreshNoise, lengths: tuple[int, ...]) -> torch.Tensor:
    """The gradient with noise along each row, after which all valid rows have the same expected squared norm.

    `max_norm` of Li et al., 2021 (Label Leakage and Protection in Two-party Split Learning): a row g becomes
    g + sqrt(m² / |g|² - 1) x g, with m the greatest norm of the batch and x standard normal. The mean stays the same.
    A row without any gradient, which would betray itself by that, gets a random direction and the length m |x|.
    """
    wide_BTD = grad_BTD.float()
    valid_BT = torch.arange(wide_BTD.shape[1])[None] < torch.tensor(lengths)[:, None]
    norms_BT1 = wide_BTD.norm(dim=-1, keepdim=True)
    greatest = norms_BT1[valid_BT.to(norms_BT1.device)].max()
    empty_BT1 = norms_BT1 == 0
    along_BT1 = ((greatest / torch.where(empty_BT1, 1.0, norms_BT1)).square() - 1).clamp_min(0).sqrt()
    noised_BTD = wide_BTD * (1 + along_BT1 * source.like(norms_BT1))
    direction_BTD = torch.nn.functional.normalize(source.like(wide_BTD), dim=-1)
    noised_BTD = torch.where(empty_BT1, greatest * source.like(norms_BT1) * direction_BTD, noised_BTD)
    return noised_BTD.to(grad_BTD.dtype)
