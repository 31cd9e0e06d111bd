"""What an attack works on, written while a run trains: what the trunk received, and what the client knows to be true.

    recordings/trunk-<rank>/client-<k>.step-<n>.micro-<m>.safetensors   smashed activations, lengths, gradient
    recordings/client-<k>/client-<k>.step-<n>.micro-<m>.safetensors     token ids, labels: private text
    recordings/wire/client-<k>.step-<n>.micro-<m>.safetensors           the sealed messages of SMASHED, as on the wire

Each file is whole or not there, and readable by its owner alone. Steps count from 0. `hpc.privacy.recorded` reads them.
Shape suffixes: S valid tokens of all rows together, D hidden size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save

from hpc.acts import Micro
from hpc.config import Config
from hpc.data.collate import Batch
from hpc.files import drafted
from hpc.link.channel import Channel
from hpc.link.frame import Header

RECORDINGS, WIRE = "recordings", "wire"
WIRE_LIMIT_BYTES = 64 * 2**20  # of sealed messages that one client keeps in a run

_log = logging.getLogger("hpc")


class TrunkRecorder:
    """A trunk rank's side: what an honest-but-curious server has of a batch once its gradient came."""

    def __init__(self, folder: Path, *, rank: int, steps: int) -> None:
        """Of the first `steps` steps of the run whose folder is `folder`."""
        self._folder, self._steps = folder / RECORDINGS / f"trunk-{rank}", steps
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    @staticmethod
    def of(config: Config, folder: Path, rank: int, start: int) -> TrunkRecorder | None:
        """What the configuration asks for. An earlier attempt's recordings of steps from `start` on are removed."""
        own, steps = folder / RECORDINGS / f"trunk-{rank}", config.privacy.record_steps
        forget(own, start)
        for other in own.parent.glob("trunk-*"):  # of ranks that the run no longer has: nobody else removes them
            number = other.name.removeprefix("trunk-")
            if number.isdigit() and int(number) >= config.trunk.ranks:
                forget(other, start)
        return TrunkRecorder(folder, rank=rank, steps=steps) if _told(own, "what clients send", steps) else None

    def smashed(self, micro: Micro, header: Header, smashed_SD: torch.Tensor) -> None:
        """A whole batch, rows from the server's cache included. Kept until its gradient comes."""
        if header.step >= self._steps:
            return
        if any(f".step-{header.step}." not in name for name in self._held):
            self._held.clear()  # of clients that were lost in an earlier step
        self._held[name_of(micro.client, header.step, micro.piece)] = {
            "smashed_SD": smashed_SD.detach().to("cpu", torch.float32, copy=True),
            "lengths": torch.tensor(header.lengths),
            "label_tokens": torch.tensor(int(header.weight)),
        }

    def answered(self, micro: Micro, step: int, trunk_out_SD: torch.Tensor) -> None:
        """What the trunk made of the batch: a gradient is matched there."""
        held = self._held.get(name_of(micro.client, step, micro.piece))
        if held is not None:
            held["trunk_out_SD"] = trunk_out_SD.detach().to("cpu", torch.float32, copy=True)

    def gradient(self, micro: Micro, header: Header, grad_trunk_out_SD: torch.Tensor) -> None:
        """The batch is complete: written."""
        name = name_of(micro.client, header.step, micro.piece)
        held = self._held.pop(name, None)
        if held is not None:
            grad_SD = grad_trunk_out_SD.detach().to("cpu", torch.float32)
            write(self._folder / name, {**held, "grad_trunk_out_SD": grad_SD})


class ClientRecorder:
    """A client's side: the truth, and its sealed messages."""

    def __init__(self, folder: Path, *, client_id: int, steps: int, channel: Channel) -> None:
        """See `TrunkRecorder`. The messages are those that `channel` hands to its transport."""
        root = folder / RECORDINGS
        self._own, self._wire, self._client_id = root / f"client-{client_id}", root / WIRE, client_id
        self._steps, self._channel, self._left = steps, channel, WIRE_LIMIT_BYTES

    @staticmethod
    def of(config: Config, folder: Path, client_id: int, channel: Channel, start: int | None) -> ClientRecorder | None:
        """As `TrunkRecorder.of`; `start`: None for a client that comes back, whose recordings stay."""
        root, steps = folder / RECORDINGS, config.privacy.record_steps
        own = root / f"client-{client_id}"
        if start is not None:
            forget(own, start)
            forget(root / WIRE, start, f"client-{client_id}.")
        if not _told(own, "token ids and labels", steps):
            return None
        return ClientRecorder(folder, client_id=client_id, steps=steps, channel=channel)

    @contextmanager
    def recording(self, batch: Batch, *, step: int, micro: int) -> Iterator[None]:
        """Around the sending of a batch: keep what is true of it, and its sealed messages."""
        if step >= self._steps:
            yield
            return
        self._write_truth(batch, name_of(self._client_id, step, micro))
        messages: list[torch.Tensor] = []
        with self._channel.tapped(lambda message: messages.append(message.clone())):
            yield
        self._left -= sum(message.numel() for message in messages)
        if self._left >= 0:
            tensors = {f"message-{index:06d}": message for index, message in enumerate(messages)}
            write(self._wire / name_of(self._client_id, step, micro), tensors)

    def _write_truth(self, batch: Batch, name: str) -> None:
        rows = zip(batch.ids_BT, batch.lengths, strict=True)
        tensors = {
            "ids_S": torch.cat([ids_T[:length] for ids_T, length in rows]),
            "lengths": torch.tensor(batch.lengths),
            "label_rows_L": batch.label_rows_L,
            "label_positions_L": batch.label_positions_L,
            "label_ids_L": batch.label_ids_L,
        }
        write(self._own / name, tensors)


def name_of(client: int, step: int, micro: int) -> str:
    """The file of one micro-batch."""
    return f"client-{client}.step-{step}.micro-{micro}.safetensors"


def step_of(path: Path) -> int:
    """The step in a recording's name; -1 where there is none."""
    _, _, rest = path.name.partition(".step-")
    digits = rest.partition(".")[0]
    return int(digits) if digits.isdigit() else -1


def forget(folder: Path, start: int, prefix: str = "client-") -> None:
    """Remove recordings of steps from `start` on: they belong to an earlier attempt, or another run in this place."""
    for path in folder.glob(f"{prefix}*.safetensors"):
        if step_of(path) >= start:
            path.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """A safetensors file, whole or not there, for its owner alone from the first byte on."""
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with drafted(path) as draft:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _told(folder: Path, what: str, steps: int) -> bool:
    """Whether to record at all; then the log says so."""
    if steps:
        _log.warning("--privacy.record_steps %d: %s is written to %s, and gives away private text", steps, what, folder)
    return steps > 0
