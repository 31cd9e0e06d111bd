"""Checks that need a file: all before any work starts, each with one message that says what to change.

No torch here: a refusal takes a second, not ten.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpc.agreement import lasting_agreement
from hpc.config import Config
from hpc.data.examples import held_out_examples, training_examples
from hpc.errors import ConfigError, TopologyError
from hpc.link.meeting_file import require_folder
from hpc.quantizer import require_quantizer
from hpc.schedule import total_steps
from hpc.source.cut import Cut, PartKind
from hpc.source.published_prefix import published_prefix
from hpc.source.resolve import cut_of, read_config, resolve
from hpc.topology import World
from hpc.trunk_config import read_deepspeed_json, zero_stage

RESOLVER_PAUSES_S = (0.5, 1.5)
PARTS: tuple[PartKind, ...] = ("head", "trunk", "tail")


def check(config: Config, *, coordinates: bool = True) -> None:
    """Raise a `BadInput` error for the first thing that would stop every role alike.

    `coordinates`: whether checkpoints are committed in this role's folder; another role's may hold its own files only.
    """
    check_output(config, coordinates=coordinates)
    if config.link.rendezvous:
        require_folder(config.link.rendezvous)
    check_model(config)
    require_quantizer(config.trunk.quantization)
    stage = zero_stage(read_deepspeed_json(config.trunk.deepspeed))
    _check_zero(config, stage)
    if stage == 3 and "trunk" not in config.adapter.parts and config.train.schedule != "replica":
        raise ConfigError(
            f"--trunk.deepspeed {config.trunk.deepspeed} asks for ZeRO stage 3, but --adapter.parts leaves nothing "
            "to train in the trunk; use a lower stage, or let the trunk learn"
        )


def check_model(config: Config) -> None:
    """Raise a `BadInput` error for a model that is not there, or that cannot be cut or trained as asked."""
    check_cut(config, read_config(resolve(config.model)))


def check_cut(config: Config, raw_config: dict[str, Any]) -> None:
    """Raise a `BadInput` error for a model, given by its config.json, that cannot be cut or trained as asked."""
    published_prefix(config.adapter, raw_config)
    _check_something_learns(config, cut_of(config.model, raw_config))
    _check_tied(config, bool(raw_config.get("tie_word_embeddings", False)))


def _check_zero(config: Config, stage: int) -> None:
    """ZeRO partitions what all ranks share and use in the same order; not every schedule works like that."""
    flags = f"--trunk.deepspeed {config.trunk.deepspeed} asks for ZeRO stage {stage}"
    if config.data.decodes and stage == 3:
        raise ConfigError(
            f"{flags}, which gathers parameters on all ranks together; --data.evaluate_by generation lets each client "
            "ask at its own pace. Use a lower stage, or --data.evaluate_by likelihood"
        )
    if config.train.schedule == "replica" and stage in (1, 2):
        raise ConfigError(
            f"{flags}, which partitions gradients and optimiser state that all ranks share; with --train.schedule "
            "replica each client has its own, and more --trunk.ranks share these out already. Use stage 3, which "
            "partitions the frozen base, or leave the file out"
        )
    if config.train.schedule == "replica" and stage == 3 and config.adapter.method == "full":
        raise ConfigError(
            f"{flags}, which with --train.schedule replica partitions the frozen base, but with --adapter.method full "
            "there is none; use lora or p_tuning_v2, or leave the file out"
        )
    if config.trunk.quantization == "int8" and stage == 3:
        raise ConfigError(
            f"{flags}, which partitions the weights; with --trunk.quantization int8 every rank keeps them whole, so "
            "nothing would be saved. Use --trunk.quantization nf4, or a lower stage"
        )
    if config.train.schedule == "pipelined" and stage == 3:
        raise ConfigError(
            f"{flags}, which gathers parameters block by block in one order on all ranks; --train.schedule pipelined "
            "works in the order in which clients come. Use a lower stage, or --train.schedule client_batch"
        )


def check_data(config: Config, clients: Iterable[int]) -> None:
    """Read through the data of clients on this machine. Raises `DataError` (file and line, or the client)."""
    for client_id in clients:
        training_examples(config, client_id)
        held_out_examples(config, client_id)


def check_output(config: Config, *, coordinates: bool = True) -> None:
    """Raise a `BadInput` error if the folder holds a finished run, lacks the checkpoint, or cannot be written."""
    folder, wanted = config.run.folder, config.run.resume_from_checkpoint
    if folder is None:
        return
    path = Path(folder)
    check_folder("--run.output_dir", path)
    if wanted is not None:
        if coordinates:
            from hpc.resume import find

            find(folder, wanted, lasting_agreement(config), steps=total_steps(config.train))
    elif coordinates and ((path / "summary.json").exists() or any(path.glob("checkpoint-*/manifest.json"))):
        kind = "finished run" if (path / "summary.json").exists() else "run that stopped"
        raise ConfigError(
            f"{folder} holds a {kind}; go on from its last checkpoint with --run.resume_from_checkpoint latest, "
            "or choose another --run.name or --run.output_dir"
        )


def check_folder(flag: str, path: Path) -> None:
    """Raise `ConfigError` unless files can be written in this folder, or where it would be made."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{flag} {str(path)!a} is not text in UTF-8; rename the folder") from None
    nearest = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{flag} {path}: {nearest} is a file; give a folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):  # access rights alone do not tell of a file system that is read-only
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror} in {nearest}") from None


def check_meeting_point(world: World, config: Config) -> None:
    """Raise `TopologyError` if the host where the roles are to meet has no address here."""
    if world.world_size == 1 or world.launcher == "mpi" or config.link.rendezvous:
        return
    for pause_s in (*RESOLVER_PAUSES_S, None):  # a resolver may fail for a moment when a large job starts
        try:
            socket.getaddrinfo(world.master_addr, world.master_port)
            return
        except (OSError, UnicodeError) as error:
            if pause_s is None:
                raise TopologyError(
                    f"the host {world.master_addr}, where the roles are to meet, is not known here ({error}); set "
                    "MASTER_ADDR to the name or address of trunk rank 0's host"
                ) from None
            time.sleep(pause_s)


def _check_something_learns(config: Config, cut: Cut) -> None:
    adapter = config.adapter
    if adapter.method != "full" and not any(cut.part(kind).blocks for kind in adapter.parts):
        raise ConfigError(
            f"--adapter.parts {adapter.parts} has no block at this cut, so nothing would learn; add the trunk, or use "
            "another --model.head_blocks or --model.tail_blocks"
        )
    uncut = config.train.schedule == "centralised" or config.run.baseline_steps > 0
    without = [kind for kind in PARTS if kind not in adapter.parts and cut.part(kind).blocks]
    if adapter.method == "p_tuning_v2" and uncut and without:
        raise ConfigError(
            f"--adapter.parts {adapter.parts} gives only some blocks a prefix, which an uncut model cannot have; "
            "leave out --run.baseline_steps and --train.schedule centralised, or name head, trunk and tail"
        )


def _check_tied(config: Config, tied: bool) -> None:
    parts = config.adapter.parts
    if tied and config.adapter.method == "full" and ("head" in parts) != ("tail" in parts):
        raise ConfigError(
            f"--adapter.parts {parts}: this model ties its LM head to its embedding, one tensor on one client; "
            "with --adapter.method full train both head and tail, or neither"
        )
