"""The trunk's part of the adapter, over each client's sealed link at the end of a run: its names, then its tensors.

Only this way: no client part ever goes to the trunk. A frame for each tensor, so that a trunk of billions of trained
weights (`full`) is gathered and sent piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import torch

from hpc.errors import ProtocolError
from hpc.export.layout import Layout, misfit
from hpc.export.portable import portable, portable_name, renamed
from hpc.link.frame import Frame, Header
from hpc.link.kinds import Kind
from hpc.replica_trunk import ReplicaTrunk
from hpc.served import Served
from hpc.trunk import Trunk
from hpc.trunk_link import TrunkLink

_KIND = Kind.TRUNK_ADAPTER
Named = Iterable[tuple[str, torch.Tensor]]


def send_trunk_adapter(trunk: Trunk | ReplicaTrunk, served: Served) -> None:
    """To every client of this rank what its trunk has learned. At ZeRO 1-3 collective, whoever has clients left."""
    served.keep_waiting([])
    mine = served.present(served.channels)
    if isinstance(trunk, Trunk):
        _send(served, mine, trunk.names, trunk.values())
        return
    for client in mine:
        served.keep_waiting([client])
        _send(served, [client], trunk.names, trunk.values(client))


def _send(served: Served, clients: Sequence[int], names: Sequence[str], values: Named) -> None:
    portable_names = list(dict.fromkeys(map(portable_name, names)))  # a prefix encoder's tensors become one table
    text = json.dumps(portable_names).encode()
    for client in clients:
        served.send(client, Header(kind=_KIND), torch.frombuffer(bytearray(text), dtype=torch.uint8))
    for number, (_, tensor) in enumerate(_in_form(names, values)):
        for client in clients:
            served.send(client, Header(kind=_KIND, micro=number), tensor)


def _in_form(names: Sequence[str], values: Named) -> Iterator[tuple[str, torch.Tensor]]:
    if any(name.startswith("prefix.") for name in names):
        return iter(portable(dict(values)).items())
    return renamed(values)


def receive_trunk_adapter(link: TrunkLink, layout: Layout) -> dict[str, torch.Tensor]:
    """Portable name → tensor. Raises `ProtocolError` for anything but what this trunk, at this cut, trains."""
    due = layout.shapes(["trunk"])
    names = _names(link.recv_next(_KIND))
    # Before any tensor is taken, and again with the shapes that came.
    _refuse(misfit({name: due.get(name, ()) for name in names}, layout, ["trunk"]))
    values = {}
    for number, name in enumerate(names):
        frame = link.recv_next(_KIND)
        values[name] = frame.payload
        if frame.header.shape != due.get(name, frame.header.shape):  # now: the others may be gigabytes
            _refuse(f"{name} has shape {frame.header.shape}; due: {due[name]}")
        if frame.header.micro != number or frame.header.dtype != torch.float32:
            raise ProtocolError(
                f"the trunk sent tensor {frame.header.micro} of its adapter in {frame.header.dtype}; due: {number} "
                "in float32"
            )
    _refuse(misfit({name: tuple(value.shape) for name, value in values.items()}, layout, ["trunk"]))
    return values


def _names(frame: Frame) -> list[str]:
    if frame.header.dtype != torch.uint8:
        raise ProtocolError(f"the trunk sent names of its adapter in {frame.header.dtype}; due: bytes")
    try:
        names = json.loads(frame.payload.numpy().tobytes())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the trunk sent names of its adapter that are not JSON ({error})") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ProtocolError("the trunk sent names of its adapter that are not a list of different names")
    return names


def _refuse(fault: str | None) -> None:
    if fault is not None:
        raise ProtocolError(f"the trunk sent an adapter that does not fit here: {fault}")
