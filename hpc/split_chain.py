"""A client's end of generation: its head and tail, and the trunk at the other end of the link.

Shape suffixes: B rows, T new columns, D hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from contextlib import suppress

import torch

from hpc.config import MAX_ROWS
from hpc.errors import ConfigError, LinkError, ProtocolError
from hpc.layouts import layout_numbers
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.model.part import Part
from hpc.privacy.defences.shield import OPEN, Shield
from hpc.ragged import pack_masked, pad_masked
from hpc.trunk_link import TrunkLink


class SplitChains:
    """Begins chains over one link, and numbers them."""

    def __init__(self, head: Part, tail: Part, link: TrunkLink, shield: Shield = OPEN) -> None:
        """`shield`: what is done to all that leaves."""
        self.head, self.tail, self.link, self.shield = head, tail, link, shield
        self._numbers = itertools.count()

    def open(self, rows: int) -> SplitChain:
        """Raises `ConfigError` for more rows than a frame describes."""
        if rows > MAX_ROWS:
            raise ConfigError(f"{rows} rows (prompts x beams or sequences) at a time; at most {MAX_ROWS} are possible")
        return SplitChain(self, rows, next(self._numbers) % 2**32)

    def enough(self) -> None:
        """Tell the trunk that this client generates nothing more for now."""
        self.link.send(Header(kind=Kind.ENOUGH))


class SplitChain:
    """A `Chain` (`hpc.model.continued`) of which the middle part is elsewhere.

    Of the prompt every token's hidden state crosses, then the new token's only; keys and values stay where they are.
    """

    def __init__(self, parts: SplitChains, rows: int, number: int) -> None:
        self._parts, self._number, self._open = parts, number, False
        self._head, self._tail = parts.head.remember(rows), parts.tail.remember(rows)

    @property
    def columns(self) -> int:
        return self._head.columns

    def extend(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """`logits_BV` of the last column."""
        smashed_BTD = self._parts.shield.smashed(self._parts.head.extend(ids_BT, self._head, mask_BT))
        lengths = tuple(mask_BT.sum(1).tolist())
        layout_B2 = None if self._open else self._head.layout_B2  # of the prompt; it holds for what follows
        header = Header(kind=Kind.DECODE, micro=self._number, lengths=lengths, layout=layout_numbers(layout_B2))
        self._open, self._tail.layout_B2 = True, self._head.layout_B2
        self._parts.link.send(header, pack_masked(smashed_BTD, mask_BT))
        packed_SD = self._parts.link.recv(Kind.DECODED, 0, micro=self._number).payload
        if packed_SD.shape != (sum(lengths), smashed_BTD.shape[-1]) or packed_SD.dtype != smashed_BTD.dtype:
            raise ProtocolError(
                f"the trunk sent DECODED of {tuple(packed_SD.shape)}, {packed_SD.dtype} for {sum(lengths)} tokens"
            )
        return self._parts.tail.extend(pad_masked(packed_SD, mask_BT), self._tail, mask_BT)

    def reorder(self, rows_B: torch.Tensor) -> None:
        for memory in (self._head, self._tail):
            memory.reorder(rows_B)
        self._parts.link.send(Header(kind=Kind.REORDER, micro=self._number), rows_B.to("cpu", torch.int64))

    def close(self) -> None:
        if self._open:
            self._open = False
            with suppress(LinkError):  # what broke the link is on its way already
                self._parts.link.send(Header(kind=Kind.FORGET, micro=self._number))
