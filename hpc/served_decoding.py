"""The trunk's end of generation: each client's rows are continued as it asks, whichever client asks first.

Shape suffixes: B rows, T new columns, D hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hpc.errors import LinkError, ProtocolError
from hpc.layouts import layout_tensor
from hpc.link.frame import Frame, Header
from hpc.link.kinds import Kind
from hpc.link.limits import WIDEST
from hpc.model.memory import Memory
from hpc.model.part import Part
from hpc.ragged import left_mask, pack_masked, pad_masked
from hpc.served import Served

REQUESTS = (Kind.DECODE, Kind.REORDER, Kind.FORGET, Kind.ENOUGH)
MAX_CHAINS = 4  # of one client at a time: a client must not fill the trunk's memory


class Continuing(Protocol):
    """A trunk that can continue a client's rows."""

    part: Part

    def remember(self, client: int, rows: int, layout_B2: torch.Tensor | None = None) -> Memory: ...

    def extend(self, client: int, smashed_BTD: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor: ...


class PlainTrunk:
    """A trunk part alike for all clients, without an optimiser."""

    def __init__(self, part: Part) -> None:
        self.part = part

    def remember(self, client: int, rows: int, layout_B2: torch.Tensor | None = None) -> Memory:
        return self.part.remember(rows, layout_B2)

    def extend(self, client: int, smashed_BTD: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        return self.part.extend(smashed_BTD, memory, mask_BT)


class ServedDecoding:
    """Answers requests until every client has had enough."""

    def __init__(self, served: Served, trunk: Continuing, *, context: int, limit_bytes: int) -> None:
        """`context`: most columns of a row, prompt included; `limit_bytes`: of keys and values, for each client."""
        self._served, self._trunk, self._context = served, trunk, context
        self._cells = limit_bytes // max(1, trunk.part.kv_bytes)  # one is a token's keys and values
        self._memories: dict[tuple[int, int], Memory] = {}  # (client, its number for the rows)
        for channel in served.channels.values():
            channel.limits.set((Kind.DECODE,), WIDEST * self._cells * served.hidden_size)

    def serve(self, clients: Sequence[int], farewell: Callable[[int], None] = lambda client: None) -> None:
        """`farewell` is called for each client that has had enough, while others may still ask.

        Raises as `Served.lose` does for a client that sends what cannot be, or that is gone.
        """
        asking, told = set(clients), time.monotonic()
        while asking:
            if time.monotonic() - told > self._served.timeout_s / 4:  # who asks often must not silence the trunk
                told = time.monotonic()
                self._served.keep_waiting(sorted(asking))
            client, frame = self._served.recv_request(sorted(asking), REQUESTS)
            if frame is not None:
                try:
                    self._answer(client, frame)
                except LinkError as error:
                    self._served.lose(client, -1, error)
            enough = frame is not None and frame.header.kind is Kind.ENOUGH
            if client in self._served.lost or enough:
                asking.discard(client)
                self._forget_all(client)
            if enough:
                farewell(client)

    def _answer(self, client: int, frame: Frame) -> None:
        key = client, frame.header.micro
        match frame.header.kind:
            case Kind.DECODE:
                self._extend(client, frame)
            case Kind.REORDER:
                self._reorder(key, frame.payload)
            case Kind.FORGET:
                self._memories.pop(key, None)

    def _extend(self, client: int, frame: Frame) -> None:
        header, key = frame.header, (client, frame.header.micro)
        self._check(client, header)
        if key not in self._memories:
            self._memories[key] = self._trunk.remember(client, len(header.lengths), layout_tensor([header]))
        mask_BT = left_mask(header.lengths)
        smashed_BTD = pad_masked(frame.payload, mask_BT)
        out_BTD = self._trunk.extend(client, smashed_BTD, self._memories[key], mask_BT)
        reply = Header(kind=Kind.DECODED, micro=header.micro, lengths=header.lengths)
        self._served.send(client, reply, pack_masked(out_BTD, mask_BT).contiguous())

    def _check(self, client: int, header: Header) -> None:
        who, lengths = f"client {client}", header.lengths
        due = (sum(lengths), self._served.hidden_size)
        if not lengths or min(lengths) < 1 or header.shape != due or header.dtype != self._served.dtype:
            raise ProtocolError(
                f"{who} sent DECODE of {header.shape}, {header.dtype} for rows of {lengths} tokens; due: {due}, "
                f"{self._served.dtype}, each row with a token"
            )
        memory = self._memories.get((client, header.micro))
        if memory is None:
            self._served.check_layout(header, who)
        if memory is None and sum(owner == client for owner, _ in self._memories) >= MAX_CHAINS:
            raise ProtocolError(f"{who} begins more than {MAX_CHAINS} batches of rows at a time")
        if memory is not None and (len(lengths) != memory.rows or len(set(lengths)) > 1):
            raise ProtocolError(f"{who} continues {memory.rows} rows with rows of {lengths} tokens")
        columns = max(lengths) + (memory.columns if memory is not None else 0)
        if columns > self._context:
            raise ProtocolError(f"{who} continues a row to {columns} tokens; the context holds {self._context}")
        others = [m for (owner, number), m in self._memories.items() if owner == client and number != header.micro]
        cells = len(lengths) * columns + sum(each.rows * each.columns for each in others)
        if cells > self._cells:
            raise ProtocolError(
                f"{who} asks for keys and values of {cells} tokens; --trunk.generation_gib leaves room for "
                f"{self._cells}"
            )

    def _reorder(self, key: tuple[int, int], rows_B: torch.Tensor) -> None:
        memory = self._memories.get(key)
        sound = rows_B.dtype == torch.int64 and memory is not None and rows_B.shape == (memory.rows,)
        if not sound or memory is None or not bool(((rows_B >= 0) & (rows_B < memory.rows)).all()):
            raise ProtocolError(f"client {key[0]} reorders rows that it has not: {tuple(rows_B.shape)}, {rows_B.dtype}")
        memory.reorder(rows_B)

    def _forget_all(self, client: int) -> None:
        for key in [key for key in self._memories if key[0] == client]:
            del self._memories[key]
