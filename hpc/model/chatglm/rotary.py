"""ChatGLM's two-dimensional rotary positions: half of each head turns with the position, half with the block position.

Shape suffixes: B rows, T tokens, H heads, K head size, R = K / 4 frequencies.
"""

from __future__ import annotations

import torch
from torch import nn

BASE = 10000.0


def frequencies(head_size: int) -> torch.Tensor:
    """`inv_freq_R` in float32, rounded through float16: the model was trained with them in half precision."""
    width = head_size // 2
    exponent_R = torch.arange(0, width, 2, dtype=torch.float32) / width
    return (1.0 / BASE**exponent_R).half().float()


class RotaryFrequencies(nn.Module):
    """Holds the `inv_freq` that the published files store in every block; nothing reads it.

    The published code recomputes the table as well. Taking the loaded one would follow the weights' dtype: in
    bfloat16 its eight bits put a token at place 500 more than a radian off.
    """

    inv_freq: torch.Tensor

    def __init__(self, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.register_buffer("inv_freq", frequencies(head_size))


def rotation_of(position_B2T: torch.Tensor, head_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, `_B1TK`, of every token's angles; computed in float32, returned in `dtype`."""
    inv_freq_R = frequencies(head_size).to(position_B2T.device)
    angle_B2TR = position_B2T[..., None].float() * inv_freq_R
    # Each half of a head pairs its first half with its second: the angles come twice.
    half_B2TK = torch.cat([angle_B2TR, angle_B2TR], -1)
    angle_B1TK = torch.cat(half_B2TK.unbind(1), -1)[:, None]
    return angle_B1TK.cos().to(dtype), angle_B1TK.sin().to(dtype)


def rotate(states_BHTK: torch.Tensor, rotation_B1TK: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys by their positions."""
    cos_B1TK, sin_B1TK = rotation_B1TK
    first, second, third, fourth = states_BHTK.chunk(4, -1)
    turned_BHTK = torch.cat([-second, first, -fourth, third], -1)
    return states_BHTK * cos_B1TK + turned_BHTK * sin_B1TK
