"""The trunk that the schedule asks for, with values that all clients share or with a replica for each of them."""

from __future__ import annotations

from pathlib import Path

import torch

from hpc.checkpoint import UNNAMED, Attempt, checkpoint_folder, read_role
from hpc.config import Config
from hpc.errors import ConfigError
from hpc.model.part import Part
from hpc.redeal import read_replicas
from hpc.replica_trunk import ReplicaTrunk, replica_bytes
from hpc.topology import clients_of_trunk_rank
from hpc.trunk import Trunk


def build_trunk(
    part: Part,
    config: Config,
    *,
    rank: int,
    device: torch.device,
    folder: Path,
    start: int,
    attempt: Attempt = UNNAMED,
) -> tuple[Trunk | ReplicaTrunk, dict[str, float]]:
    """The trunk of one rank, and the facts that its checkpoint at step `start` holds (0: none).

    Raises `ConfigError` if the clients' copies of what learns would take more than `trunk.replica_limit_gib`,
    `CheckpointError` if the checkpoint's file is missing or not what was written.
    """
    check_room(part, config, rank)
    saved = checkpoint_folder(folder, start)
    if config.train.schedule == "replica":
        clients = clients_of_trunk_rank(rank, config)
        replicas = ReplicaTrunk(part, config, clients=clients, device=device)
        if not start:
            return replicas, {}
        tensors, facts = read_replicas(saved, clients, rank=rank, attempt=attempt.takes_up, learns=replicas.learns)
        replicas.load_state(tensors)
        return replicas, facts
    tensors, facts = read_role(saved, "trunk", attempt=attempt.takes_up) if start else ({}, {})
    if start:
        part.load_trainable(tensors)
    trunk = Trunk(part, config, ranks=config.trunk.ranks, device=device)
    if start:
        trunk.load_moments(tensors)
    return trunk, facts


def check_room(part: Part, config: Config, rank: int) -> None:
    """`replica` has a copy of what learns for each client, `pipelined` a gradient; with `full` these are whole trunks.

    Raises `ConfigError` if they take more than `trunk.replica_limit_gib`.
    """
    copies = {"replica": 1.0, "pipelined": 0.25}.get(config.train.schedule, 0.0)  # of values, gradient and moments
    if config.adapter.method != "full" or not copies:
        return
    clients = len(clients_of_trunk_rank(rank, config))
    trainable = sum(p.numel() for p in part.trainable().values())
    needed, limit = copies * replica_bytes(trainable, clients) / 2**30, config.trunk.replica_limit_gib
    if needed > limit:
        raise ConfigError(
            f"--train.schedule {config.train.schedule} with --adapter.method full keeps {needed:.2f} GiB for "
            f"{clients} clients' copies of {trainable:,} values; --trunk.replica_limit_gib is {limit:g}. Use lora or "
            "p_tuning_v2, fewer clients, more trunk ranks, or a higher limit"
        )
