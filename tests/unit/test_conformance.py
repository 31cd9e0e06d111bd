"""What really crosses the links of a run is what the programs say, frame by frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc.acts import Recv, Send
from hpc.client import Client
from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig, TrunkConfig
from hpc.link.kinds import Kind
from hpc.programs import Traits, client_step, client_sync
from hpc.schedule import Sync, TrainStep, instructions
from tests.loopback import run_split
from tests.unit.test_lost_clients import peers_in

OUTSIDE = {Kind.READY, Kind.PEER_KEY, Kind.BYE, Kind.HANDOVER, Kind.TRUNK_ADAPTER}


@pytest.mark.parametrize(
    ("train", "parts", "cache"),
    [
        ({"schedule": "client_batch", "clients_per_round": 2}, ["head", "trunk", "tail"], 0),
        ({"schedule": "client_batch"}, ["trunk", "tail"], 1),
        ({"schedule": "pipelined", "micro_batches": 3, "aggregation": "fedavg"}, ["head", "trunk", "tail"], 0),
        ({"schedule": "pipelined"}, ["trunk"], 1),
        ({"schedule": "replica", "secure_aggregation": True, "sync_every": 2}, ["head", "trunk", "tail"], 0),
        ({"schedule": "client_batch", "secure_aggregation": True}, ["head", "trunk", "tail"], 0),
        ({"schedule": "serial"}, ["head", "trunk", "tail"], 0),
    ],
)
def test_frames_follow_the_programs(
    train: dict[str, Any], parts: list[Any], cache: float, tmp_path: Path, pristine_keys: Path
) -> None:
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=2, parts=parts),
        data=DataConfig(train_examples=6, val_examples=0),
        train=TrainConfig(**{"clients": 3, "max_steps": 3, "per_client_batch_size": 3, **train}),
        trunk=TrunkConfig(smashed_cache_mib=cache),
    )
    sent: dict[int, list[tuple[Kind, int]]] = {0: [], 1: [], 2: []}
    received: dict[int, list[tuple[Kind, int]]] = {0: [], 1: [], 2: []}

    def prepare(client: Client) -> None:
        send = client.channel.send

        def noted(header: Any, tensor: Any = None) -> None:
            sent[client.client_id].append((header.kind, header.micro))
            send(header, tensor)

        client.channel.send = noted  # type: ignore[method-assign]
        recv = client.link._inbox.recv

        def read(*peer_and_kinds: Any, **more: Any) -> Any:
            frame = recv(*peer_and_kinds, **more)
            received[client.client_id].append((frame.header.kind, frame.header.micro))
            return frame

        client.link._inbox.recv = read  # type: ignore[method-assign]

    run_split(config, tmp_path, prepare=prepare, peers=peers_in(pristine_keys) if config.train.clients_meet else None)
    traits = Traits.of(config)
    for client, frames in sent.items():
        planned: list[tuple[Kind, int]] = []
        due: list[tuple[Kind, int]] = []
        for instruction in instructions(config.train, evaluate=False):
            if isinstance(instruction, TrainStep):
                acts = list(client_step(instruction, traits, client))
            elif isinstance(instruction, Sync):
                acts = list(client_sync(instruction, traits, client))
            else:
                continue
            planned += [(act.kind, act.micro.piece) for act in acts if isinstance(act, Send)]
            due += [(act.kind, act.micro.piece) for act in acts if isinstance(act, Recv)]
        assert [frame for frame in frames if frame[0] not in OUTSIDE] == planned
        # The trunk's frames may overtake each other between kinds.
        assert sorted(frame for frame in received[client] if frame[0] not in OUTSIDE) == sorted(due)
