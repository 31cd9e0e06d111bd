"""The networks that invert smashed activations: a GRU or a transformer, and a layer that names tokens.

Shape suffixes: B rows, T tokens, S tokens of all rows, D hidden size of the model, H width of the network, V
vocabulary, C chosen tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class NetworkOptions(Protocol):
    """What of the inverter's options makes the network."""

    @property
    def architecture(self) -> str: ...
    @property
    def reads_back(self) -> bool: ...
    @property
    def output(self) -> str: ...
    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...


class Network(nn.Module):
    """Activations `_BTD` → for each position what `logits` scores tokens by."""

    mean_D: torch.Tensor
    scale_D: torch.Tensor

    def __init__(self, *, reader: nn.Module, namer: TiedNamer | OwnNamer, known_SD: torch.Tensor) -> None:
        """`known_SD`: activations whose mean and spread are taken out before reading."""
        super().__init__()
        self.reader, self.namer = reader, namer
        self.register_buffer("mean_D", known_SD.mean(0))
        self.register_buffer("scale_D", known_SD.std(0).clamp_min(1e-6))

    @property
    def vocabulary(self) -> int:
        return self.namer.vocabulary

    def forward(self, smashed_BTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """What the namer takes, for each position."""
        read_BTH = self.reader((smashed_BTD - self.mean_D) / self.scale_D, lengths)
        found: torch.Tensor = self.namer(read_BTH, smashed_BTD)
        return found

    def logits(self, found_SD: torch.Tensor, chosen_C: torch.Tensor | None = None) -> torch.Tensor:
        """`_SC`, or `_SV` of the whole vocabulary."""
        return self.namer.logits(found_SD, chosen_C)


class GruReader(nn.Module):
    """A GRU over each row, one way or both."""

    def __init__(self, size: int, hidden: int, layers: int, *, both_ways: bool) -> None:
        super().__init__()
        self.gru = nn.GRU(size, hidden, layers, batch_first=True, bidirectional=both_ways)

    def forward(self, inputs_BTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        packed = pack_padded_sequence(inputs_BTD, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        read_BTH: torch.Tensor = pad_packed_sequence(self.gru(packed)[0], batch_first=True)[0]
        return read_BTH


class TransformerReader(nn.Module):
    """A small transformer with sinusoidal positions (Vaswani et al., 2017), which hold for any length."""

    def __init__(self, size: int, hidden: int, layers: int, heads: int, *, both_ways: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(size, hidden)
        block = nn.TransformerEncoderLayer(
            hidden, heads, 4 * hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(hidden), enable_nested_tensor=False)
        self.both_ways = both_ways

    def forward(self, inputs_BTD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        tokens = inputs_BTD.shape[1]
        hidden_BTH = self.enter(inputs_BTD)
        padding_BT = torch.arange(tokens)[None] >= torch.tensor(lengths)[:, None]
        ahead_TT = None if self.both_ways else torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        read_BTH: torch.Tensor = self.blocks(
            hidden_BTH + _sinusoids(tokens, hidden_BTH.shape[-1]), mask=ahead_TT, src_key_padding_mask=padding_BT
        )
        return read_BTH


def _sinusoids(tokens: int, hidden: int) -> torch.Tensor:
    """`_TH`."""
    rates = torch.exp(torch.arange(0, hidden, 2) * (-math.log(10000.0) / hidden))
    angles_TF = torch.arange(tokens)[:, None] * rates
    return torch.cat([angles_TF.sin(), angles_TF.cos()], dim=1)[:, :hidden]


class TiedNamer(nn.Module):
    """Names tokens by the cosine with the public embedding table, which stays as it is.

    The direction is the activation itself, turned by a matrix that starts from the identity, plus what the reader adds,
    which starts from 0: before any training this is the nearest neighbour.
    """

    table_VD: torch.Tensor

    def __init__(self, width: int, embedding_VD: torch.Tensor) -> None:
        super().__init__()
        size = embedding_VD.shape[1]
        self.register_buffer("table_VD", nn.functional.normalize(embedding_VD, dim=-1))
        self.turn_DD = nn.Parameter(torch.eye(size))
        self.add = nn.Linear(width, size)
        nn.init.zeros_(self.add.weight)
        nn.init.zeros_(self.add.bias)
        self.log_scale = nn.Parameter(torch.tensor(math.log(20.0)))

    @property
    def vocabulary(self) -> int:
        return len(self.table_VD)

    def forward(self, read_BTH: torch.Tensor, smashed_BTD: torch.Tensor) -> torch.Tensor:
        direction_BTD = nn.functional.normalize(smashed_BTD, dim=-1) @ self.turn_DD + self.add(read_BTH)
        return nn.functional.normalize(direction_BTD, dim=-1)

    def logits(self, found_SD: torch.Tensor, chosen_C: torch.Tensor | None) -> torch.Tensor:
        table = self.table_VD if chosen_C is None else self.table_VD[chosen_C]
        return self.log_scale.exp() * found_SD @ table.T


class OwnNamer(nn.Module):
    """A linear layer of its own over the reader's states."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.name = nn.Linear(width, vocabulary)

    @property
    def vocabulary(self) -> int:
        return self.name.out_features

    def forward(self, read_BTH: torch.Tensor, smashed_BTD: torch.Tensor) -> torch.Tensor:
        return read_BTH

    def logits(self, found_SH: torch.Tensor, chosen_C: torch.Tensor | None) -> torch.Tensor:
        chosen = slice(None) if chosen_C is None else chosen_C
        return nn.functional.linear(found_SH, self.name.weight[chosen], self.name.bias[chosen])


def make_network(known_SD: torch.Tensor, embedding_VD: torch.Tensor, options: NetworkOptions) -> Network:
    """An untrained one for activations like `known_SD`; draws from torch's global generator."""
    size, hidden, both_ways = known_SD.shape[1], options.hidden, options.reads_back
    if options.architecture == "gru":
        reader: nn.Module = GruReader(size, hidden, options.layers, both_ways=both_ways)
        width = hidden * (1 + both_ways)
    else:
        reader = TransformerReader(size, hidden, options.layers, options.heads, both_ways=both_ways)
        width = hidden
    namer = TiedNamer(width, embedding_VD) if options.output == "tied" else OwnNamer(width, len(embedding_VD))
    return Network(reader=reader, namer=namer, known_SD=known_SD)
