"""--dry_run: the table of who would run where; the memory against parts that were really built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpc.config import AdapterConfig, Config, ModelConfig, TrainConfig, TrunkConfig
from hpc.dry_run import planned_seats
from hpc.model.build import ModelBuilder
from hpc.model.estimate import role_bytes
from hpc.topology import read_world
from tests.runs import TRAIN


def weigh(*parts: torch.nn.Module) -> int:
    """Frozen tensors as they are, and 16 bytes for each value that learns."""
    values = {id(p): p for part in parts for p in part.parameters()}.values()
    return sum(p.numel() * (16 if p.requires_grad else p.element_size()) for p in values)


@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_that_of_the_parts(method: str, dtype: str) -> None:
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama", dtype=dtype),  # type: ignore[arg-type]
        adapter=AdapterConfig(method=method),  # type: ignore[arg-type]
    )
    builder = ModelBuilder.of(config)
    assert role_bytes(config) == {"trunk": weigh(builder.part("trunk")), "client": weigh(*builder.client_parts())}


def test_a_tied_embedding_counts_once() -> None:
    config = Config(model=ModelConfig(name_or_path="smollm2-135m"), adapter=AdapterConfig(parts=["trunk"]))
    embedding = 49_152 * 576 * 4
    assert embedding < role_bytes(config)["client"] < 2 * embedding


def test_replicas_count_once_for_each_client_of_a_rank() -> None:
    model = ModelConfig(name_or_path="tiny-llama")
    one, four = (
        role_bytes(Config(model=model, train=TrainConfig(schedule="replica", clients=clients)))["trunk"]
        for clients in (1, 4)
    )
    learning = ModelBuilder.of(Config(model=model)).part("trunk").trainable().values()
    assert four - one == 3 * 16 * sum(p.numel() for p in learning)


def test_the_uncut_model_is_one_role() -> None:
    model = ModelConfig(name_or_path="tiny-llama")
    config = Config(model=model, train=TrainConfig(schedule="centralised"))
    assert role_bytes(config) == {"centralised": weigh(ModelBuilder.of(config).part("whole"))}


def seats(environ: dict[str, str]) -> list[tuple[str, str]]:
    config = Config(train=TrainConfig(clients=3), trunk=TrunkConfig(ranks=1))
    return [(seat.role, seat.host.name) for seat in planned_seats(config, read_world(environ), environ)]


def test_ranks_of_torchrun_are_shown_host_by_host() -> None:
    found = seats({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"})
    assert [role for role, _ in found] == ["trunk-0", "client-0", "client-1", "client-2"]
    assert [host for _, host in found[2:]] == ["host 1", "host 1"]


def test_tasks_of_srun_are_shown_with_their_hosts() -> None:
    step = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}
    step |= {"SLURM_STEP_NODELIST": "a[1-3]", "SLURM_STEP_TASKS_PER_NODE": "2,1(x2)"}
    assert [host for _, host in seats(step)] == ["a1", "a1", "a2", "a3"]


def test_the_command_starts_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, TRAIN, "--dry_run", "--model.name_or_path", "tiny-llama", "--run.name", "x"]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[:4]] == ["role", "trunk-0", "client-0", "client-1"]
    assert "Dry run: nothing was started." in done.stdout
    assert not list(tmp_path.iterdir())
