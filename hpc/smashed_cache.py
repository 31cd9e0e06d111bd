"""Smashed activations that the server keeps because nothing in the client heads changes them.

Client and server each keep the same book of what is held, so neither has to ask: rows are entered in the order in
which they are sent, as long as they fit, and stay. A new process begins with an empty book on both sides, since a run
that is taken up again starts all its processes anew.

Shape suffixes: S tokens of some rows together, D hidden size, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpc.errors import ProtocolError


class CacheBook:
    """Which rows of one client are held, and how much room is left."""

    def __init__(self, *, limit_bytes: int, token_bytes: int) -> None:
        """`token_bytes`: of one token's activation on the wire."""
        self._left, self._token_bytes = limit_bytes, token_bytes
        self._lengths: dict[int, int] = {}

    def enter(self, rows: Sequence[int], lengths: Sequence[int]) -> list[bool]:
        """For each row whether it was held already; those that fit are held from now on.

        Raises ProtocolError if a held row comes with another length: it is not the same example.
        """
        return [self._enter(row, length) for row, length in zip(rows, lengths, strict=True)]

    def _enter(self, row: int, length: int) -> bool:
        if row in self._lengths:
            if self._lengths[row] != length:
                raise ProtocolError(f"example {row} came with {length} tokens; it had {self._lengths[row]} before")
            return True
        size = length * self._token_bytes
        if size <= self._left:
            self._left -= size
            self._lengths[row] = length
        return False

    def holds(self, row: int) -> bool:
        return row in self._lengths


class SmashedCache:
    """The server's side for one client: the book and the activations."""

    def __init__(self, *, limit_bytes: int, token_bytes: int) -> None:
        self.book = CacheBook(limit_bytes=limit_bytes, token_bytes=token_bytes)
        self._kept: dict[int, torch.Tensor] = {}

    def complete(
        self, rows: Sequence[int], lengths: Sequence[int], held: Sequence[bool], sent_SD: torch.Tensor
    ) -> torch.Tensor:
        """The whole batch, packed: what was sent, and from here what was not. `held` comes from `book.enter`."""
        missing = [length for length, here in zip(lengths, held, strict=True) if not here]
        sent = iter(sent_SD.split(missing))
        pieces = []
        for row, here in zip(rows, held, strict=True):
            if not here:
                piece_SD = next(sent)
                if self.book.holds(row):
                    self._kept[row] = piece_SD.clone()
            else:
                piece_SD = self._kept[row]
            pieces.append(piece_SD)
        return torch.cat(pieces)
