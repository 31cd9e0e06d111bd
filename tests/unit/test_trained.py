"""What a run has trained is taken up to generate with, or refused: never something else without a word."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, TrainConfig
from hpc.errors import CheckpointError
from hpc.export.save import forget_adapter
from hpc.model.build import ModelBuilder
from hpc.trained import source_of, take_up
from tests.loopback import Outcome, run_split
from tests.unit.test_lost_clients import peers_in


def config_of(**train: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=8, val_examples=0),
        train=TrainConfig(**{"clients": 2, "max_steps": 3, "per_client_batch_size": 2, "save_every": 2, **train}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Config, Outcome]]:
    folder, config = tmp_path_factory.mktemp("run"), config_of()
    return folder, config, run_split(config, folder)


def taken_up(folder: Path, config: Config, wanted: Any = "auto", client: int = 0) -> dict[str, torch.Tensor]:
    builder = ModelBuilder.of(config)
    source = source_of(str(folder), config, client, wanted)
    trunk, parts = builder.part("trunk"), builder.client_parts()
    take_up([trunk], source, config, role="trunk")
    take_up(parts, source, config, role=f"client-{client}")
    return {name: p.detach() for part in (trunk, *parts) for name, p in part.trainable().items()}


def test_the_adapter_holds_what_the_run_ended_with(run: tuple[Path, Config, Outcome]) -> None:
    folder, config, outcome = run
    found = taken_up(folder, config)
    assert found.keys() == outcome.trained.keys()
    assert all(torch.equal(found[name], value) for name, value in outcome.trained.items())


def test_a_checkpoint_is_another_moment(run: tuple[Path, Config, Outcome], tmp_path: Path) -> None:
    folder, config, outcome = run
    shorter = run_split(replace(config, train=replace(config.train, max_steps=2)), tmp_path)
    found = taken_up(folder, config, "checkpoint")
    assert source_of(str(folder), config, 0, "checkpoint").name == "checkpoint-2"
    assert any(not torch.equal(found[name], value) for name, value in outcome.trained.items())
    if config.train.lr_scheduler == "constant":
        assert all(torch.equal(found[name], value) for name, value in shorter.trained.items())


@pytest.mark.parametrize("wanted", ["adapter", "checkpoint"])
@pytest.mark.parametrize(
    "other",
    [
        {"adapter": AdapterConfig(lora_r=8)},
        {"adapter": AdapterConfig(lora_r=4, lora_alpha=64)},
        {"adapter": AdapterConfig(lora_r=4, target_modules=["q_proj"])},
        {"adapter": AdapterConfig(method="p_tuning_v2")},
        {"model": ModelConfig(name_or_path="tiny-llama", head_blocks=2)},
        {"model": ModelConfig(name_or_path="tiny-llama", init_seed=5)},
    ],
    ids=["rank", "scale", "targets", "method", "cut", "base weights"],
)
def test_other_settings_than_the_runs_are_refused(
    run: tuple[Path, Config, Outcome], other: dict[str, Any], wanted: str
) -> None:
    folder, config, _ = run
    with pytest.raises(CheckpointError, match=r"other settings|another model, cut or adapter"):
        taken_up(folder, replace(config, **other), wanted)


def test_of_parts_that_are_handed_on_only_the_newest_count(tmp_path: Path, pristine_keys: Path) -> None:
    config = config_of(schedule="serial")
    run_split(config, tmp_path, peers=peers_in(pristine_keys))
    with pytest.raises(CheckpointError, match="client 1 had the newest parts; use --client 1"):
        taken_up(tmp_path, config, "checkpoint", client=0)
    assert taken_up(tmp_path, config, "checkpoint", client=1)


def test_a_client_gets_its_own_replica(tmp_path: Path) -> None:
    config = config_of(schedule="replica", sync_every=5, aggregation="none")
    outcome = run_split(config, tmp_path)
    for client in range(2):
        found = taken_up(tmp_path, config, client=client)
        own = f"replica-{client}/"
        trunk = {n.removeprefix(own): v for n, v in outcome.trained.items() if n.startswith(own)}
        assert trunk
        assert all(torch.equal(found[name], value) for name, value in trunk.items())


def test_without_either_it_says_so(tmp_path: Path, run: tuple[Path, Config, Outcome]) -> None:
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        source_of(str(tmp_path), run[1], 0, "auto")
    with pytest.raises(CheckpointError, match="--source adapter"):
        source_of(str(tmp_path), run[1], 0, "adapter")


def test_a_run_that_trains_again_forgets_its_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter" / "client-0").mkdir(parents=True)
    (tmp_path / "adapter" / "client-1").mkdir()
    forget_adapter(tmp_path, "client-0")
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["client-1"]
