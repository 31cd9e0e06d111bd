"""Reads what `hpc.privacy.recording` wrote."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hpc.errors import DataError
from hpc.privacy.recording import RECORDINGS, WIRE
from hpc.privacy.seen import Sample, Seen, Truth

_NAME = re.compile(r"client-(\d+)\.step-(\d+)\.micro-(\d+)\.safetensors")
_log = logging.getLogger("hpc")

Key = tuple[int, int]
"""Step and micro-batch."""


@dataclass(kw_only=True, frozen=True)
class Sealed:
    """One batch as whoever sits on the wire has it."""

    step: int
    micro: int
    messages: tuple[torch.Tensor, ...]
    """uint8, in the order in which they left."""


def load(run_folder: Path, client: int) -> list[Sample]:
    """All recorded batches of a client, with their truth, in the order of steps and micro-batches.

    Raises `DataError` for a run without recordings (it says how to record), for a client that has none, and for files
    that cannot be read. A batch that only one side wrote (the client was lost in it) is left out, with a warning.
    """
    seen, truths = _seen(run_folder, client), _found(run_folder, f"client-{client}", client)
    if not truths:
        raise DataError(
            f"{run_folder} has what client {client} sent, but not what was true of it "
            f"({RECORDINGS}/client-{client}, which the client writes); attack where both are"
        )
    for key in sorted(seen.keys() ^ truths.keys()):
        _log.warning("step %d, micro-batch %d of client %d was recorded by one side only", *key, client)
    both = sorted(seen.keys() & truths.keys())
    if not both:
        raise DataError(f"{run_folder} has no batch of client {client} that both sides recorded; record again")
    return [_sample(seen[key], truths[key]) for key in both]


def load_seen(run_folder: Path, client: int) -> list[Seen]:
    """What the server has of a client. Raises as `load` does."""
    return [seen for _, seen in sorted(_seen(run_folder, client).items())]


def load_sealed(run_folder: Path, client: int) -> list[Sealed]:
    """What an eavesdropper has of a client, as far as it was kept. Raises as `load` does."""
    paths = _found(run_folder, WIRE, client)
    if not paths:
        raise _missing(run_folder, client, WIRE)
    return [
        Sealed(step=step, micro=micro, messages=tuple(tensor for _, tensor in sorted(_read(path).items())))
        for (step, micro), path in sorted(paths.items())
    ]


def first_rows(samples: Sequence[Sample], rows: int) -> list[Sample]:
    """The first so many rows, the last batch cut short where need be; 0: all of them."""
    kept: list[Sample] = []
    left = rows or sum(len(sample.truth.ids) for sample in samples)
    for sample in samples:
        if left > 0:
            kept.append(_cut(sample, left))
            left -= len(kept[-1].truth.ids)
    return kept


def _cut(sample: Sample, rows: int) -> Sample:
    seen, truth = sample.seen, sample.truth
    if rows >= len(truth.ids):
        return sample
    tokens = sum(seen.lengths[:rows])
    labels = [index for index, row in enumerate(truth.label_rows) if row < rows]
    gradient = None if seen.grad_trunk_out_SD is None else seen.grad_trunk_out_SD[:tokens]
    return Sample(
        seen=Seen(
            client_id=seen.client_id,
            step=seen.step,
            lengths=seen.lengths[:rows],
            smashed_SD=seen.smashed_SD[:tokens],
            grad_trunk_out_SD=gradient,
            trunk_out_SD=None if seen.trunk_out_SD is None else seen.trunk_out_SD[:tokens],
            label_tokens=len(labels),
        ),
        truth=Truth(
            ids=truth.ids[:rows],
            label_rows=tuple(truth.label_rows[index] for index in labels),
            label_positions=tuple(truth.label_positions[index] for index in labels),
            label_ids=tuple(truth.label_ids[index] for index in labels),
        ),
    )


def _seen(run_folder: Path, client: int) -> dict[Key, Seen]:
    folders = sorted(path.name for path in (run_folder / RECORDINGS).glob("trunk-*"))
    paths = {key: path for folder in folders for key, path in _found(run_folder, folder, client).items()}
    if not paths:
        raise _missing(run_folder, client, "trunk-*")
    return {key: _seen_in(path, client, key) for key, path in paths.items()}


def _seen_in(path: Path, client: int, key: Key) -> Seen:
    tensors = _read(path)
    try:
        return Seen(
            client_id=client,
            step=key[0],
            lengths=tuple(tensors["lengths"].tolist()),
            smashed_SD=tensors["smashed_SD"],
            grad_trunk_out_SD=tensors.get("grad_trunk_out_SD"),
            trunk_out_SD=tensors.get("trunk_out_SD"),
            label_tokens=int(tensors["label_tokens"]),
        )
    except KeyError as error:
        raise _broken(path, f"it lacks {error}") from None


def _sample(seen: Seen, path: Path) -> Sample:
    tensors = _read(path)
    try:
        lengths, ids_S = tensors["lengths"].tolist(), tensors["ids_S"]
        labels = [tuple(tensors[name].tolist()) for name in ("label_rows_L", "label_positions_L", "label_ids_L")]
    except KeyError as error:
        raise _broken(path, f"it lacks {error}") from None
    if tuple(lengths) != seen.lengths or sum(lengths) != len(ids_S):
        raise _broken(path, "it is of other rows than the trunk's file of the same name")
    ids = tuple(tuple(row_T.tolist()) for row_T in ids_S.split(lengths))
    return Sample(seen=seen, truth=Truth(ids=ids, label_rows=labels[0], label_positions=labels[1], label_ids=labels[2]))


def _found(run_folder: Path, folder: str, client: int) -> dict[Key, Path]:
    matches = [(_NAME.fullmatch(path.name), path) for path in (run_folder / RECORDINGS / folder).glob("client-*")]
    return {(int(m[2]), int(m[3])): path for m, path in matches if m is not None and int(m[1]) == client}


def _missing(run_folder: Path, client: int, folder: str) -> DataError:
    matches = [_NAME.fullmatch(path.name) for path in (run_folder / RECORDINGS).glob(f"{folder}/client-*")]
    clients = sorted({int(match[1]) for match in matches if match is not None})
    if not run_folder.is_dir():
        return DataError(f"{run_folder} is no folder; give the --run.output_dir of a run")
    if not clients:
        return DataError(
            f"{run_folder} has no recordings ({RECORDINGS}/{folder}): run it again with --privacy.record_steps N, "
            "which keeps what crosses the links in its first N steps"
        )
    return DataError(f"{run_folder} has recordings of clients {', '.join(map(str, clients))}, and none of {client}")


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _broken(path, str(error)) from None


def _broken(path: Path, why: str) -> DataError:
    return DataError(f"{path} is broken ({why}); remove it, or record again with --privacy.record_steps")
