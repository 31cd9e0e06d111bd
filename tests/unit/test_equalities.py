"""Split training computes the function of centralised training (docs/architecture.md, section on equalities).

Bit for bit where the same kernels run on the same rows; within 1e-6 at the first step and 1e-4 after 50 elsewhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, TrainConfig
from hpc.errors import NonFinite
from hpc.optim import LossScale
from hpc.report.events import read_events, role_path
from tests.loopback import Outcome, run_centralised, run_split
from tests.plain import plain_losses

ADAPTERS = {
    "lora": AdapterConfig(method="lora", lora_r=4),
    "p_tuning_v2": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=6),
}


def tiny(
    adapter: str = "lora", *, link: LinkConfig | None = None, model: ModelConfig | None = None, **train: Any
) -> Config:
    values: dict[str, Any] = {
        "max_steps": 20,
        "per_client_batch_size": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        **train,
    }
    return Config(
        model=model or ModelConfig(name_or_path="tiny-llama"),
        adapter=ADAPTERS[adapter],
        data=DataConfig(train_examples=24, val_examples=8),
        train=TrainConfig(**values),
        link=link or LinkConfig(),
    )


def assert_same_bits(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses
    assert one.correct == other.correct
    assert one.trained.keys() == other.trained.keys()
    for name, tensor in one.trained.items():
        assert torch.equal(tensor, other.trained[name]), name


def assert_close(found: list[float], expected: list[float], first: float = 1e-6, later: float = 1e-4) -> None:
    assert len(found) == len(expected) > 0
    assert found[0] == pytest.approx(expected[0], rel=first)
    assert found == pytest.approx(expected, rel=later)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_serial_with_one_client_equals_centralised_bit_for_bit(adapter: str, tmp_path: Path) -> None:
    split = run_split(tiny(adapter, schedule="serial", clients=1), tmp_path / "split")
    whole = run_centralised(tiny(adapter, schedule="centralised", clients=1), tmp_path / "whole")
    assert_same_bits(split, whole)
    assert split.losses[0] != split.losses[-1]


@pytest.mark.parametrize("cut", [(0, 0), (0, 2)])
def test_wherever_the_model_is_cut_the_bits_are_the_same(cut: tuple[int, int], tmp_path: Path) -> None:
    """With prefixes, whose tensors are the parts', and a gradient that is clipped."""
    model = ModelConfig(name_or_path="tiny-llama", head_blocks=cut[0], tail_blocks=cut[1])
    split = run_split(tiny("p_tuning_v2", model=model, schedule="serial", clients=1), tmp_path / "split")
    whole = run_centralised(tiny("p_tuning_v2", schedule="centralised", clients=1), tmp_path / "whole")
    assert (split.losses, split.correct) == (whole.losses, whole.correct)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clients", [1, 3])
def test_centralised_equals_plain_pytorch(adapter: str, clients: int, tmp_path: Path) -> None:
    config = tiny(adapter, schedule="centralised", clients=clients, max_steps=50)
    whole = run_centralised(config, tmp_path)
    assert_close(whole.losses, plain_losses(config, [list(range(clients))] * 50))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clients", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_client_batch_equals_the_union_batch(adapter: str, clients: int, tmp_path: Path) -> None:
    config = tiny(adapter, schedule="client_batch", clients=clients, max_steps=50)
    split = run_split(config, tmp_path / "split")
    assert_close(split.losses, plain_losses(config, [list(range(clients))] * 50))
    whole = run_centralised(tiny(adapter, schedule="centralised", clients=clients, max_steps=50), tmp_path / "whole")
    assert_close(split.losses, whole.losses)
    for name, tensor in split.trained.items():
        torch.testing.assert_close(tensor, whole.trained[name], rtol=1e-2, atol=1e-3)


def test_clients_with_shared_gradients_stay_alike(tmp_path: Path) -> None:
    split = run_split(tiny(schedule="client_batch", clients=3, max_steps=5), tmp_path)
    first, *others = [client.learner.parameters for client in split.clients]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_clients_that_keep_their_own_parts_drift_apart(tmp_path: Path) -> None:
    split = run_split(tiny(schedule="client_batch", clients=2, aggregation="none", max_steps=3), tmp_path)
    first, second = (client.learner.parameters for client in split.clients)
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_encryption_changes_no_bit(tmp_path: Path) -> None:
    sealed = run_split(tiny(schedule="client_batch", max_steps=5), tmp_path / "on")
    off = LinkConfig(encryption="off")
    plain = run_split(tiny(schedule="client_batch", max_steps=5, link=off), tmp_path / "off")
    assert_same_bits(sealed, plain)


def test_two_runs_with_one_seed_give_the_same_bits(tmp_path: Path) -> None:
    config = tiny(schedule="client_batch", max_steps=5)
    assert_same_bits(run_split(config, tmp_path / "a"), run_split(config, tmp_path / "b"))


@pytest.mark.parametrize("parts", [["trunk"], ["head"], ["tail"], ["head", "tail"]])
def test_frozen_parts(parts: list[Any], tmp_path: Path) -> None:
    """A frozen head needs no gradient; a frozen trunk still passes it on."""
    changed = {"adapter": AdapterConfig(lora_r=4, parts=parts)}
    split_config = Config(**{**vars(tiny(schedule="serial", clients=1, max_steps=5)), **changed})
    whole_config = Config(**{**vars(tiny(schedule="centralised", clients=1, max_steps=5)), **changed})
    assert_same_bits(run_split(split_config, tmp_path / "s"), run_centralised(whole_config, tmp_path / "w"))


@pytest.mark.parametrize("cut", [(0, 0), (2, 1), (0, 2)])
def test_other_cuts(cut: tuple[int, int], tmp_path: Path) -> None:
    model = ModelConfig(name_or_path="tiny-llama", head_blocks=cut[0], tail_blocks=cut[1])
    split = run_split(tiny(schedule="serial", clients=1, max_steps=5, model=model), tmp_path / "s")
    whole = run_centralised(tiny(schedule="centralised", clients=1, max_steps=5, model=model), tmp_path / "w")
    assert_same_bits(split, whole)


def test_full_fine_tuning(tmp_path: Path) -> None:
    changed = {"adapter": AdapterConfig(method="full")}
    split_config = Config(**{**vars(tiny(schedule="serial", clients=1, max_steps=5)), **changed})
    whole_config = Config(**{**vars(tiny(schedule="centralised", clients=1, max_steps=5)), **changed})
    assert_same_bits(run_split(split_config, tmp_path / "s"), run_centralised(whole_config, tmp_path / "w"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "full"])
def test_half_precision_learns_like_centralised(dtype: Any, method: Any, tmp_path: Path) -> None:
    """Not to the bit: what crosses a cut is rounded to the model's dtype, what stays inside `full` is not."""
    model = ModelConfig(name_or_path="tiny-llama", dtype=dtype)
    changed = {"adapter": AdapterConfig(method=method, num_virtual_tokens=6)}
    train = {"clients": 1, "model": model, "learning_rate": 1e-3 if method == "full" else 1e-2}
    split = run_split(Config(**{**vars(tiny(schedule="serial", **train)), **changed}), tmp_path / "s")
    whole = run_centralised(Config(**{**vars(tiny(schedule="centralised", **train)), **changed}), tmp_path / "w")
    assert split.losses == pytest.approx(whole.losses, rel=2e-2)
    assert split.losses[-1] < split.losses[0]


def grad_norms(folder: Path) -> list[float]:
    return [e["grad_norm"] for e in read_events(role_path(folder, "trunk-0")) if e["event"] == "step"]


def test_a_client_that_waits_its_turn_keeps_the_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale grows at steps that the other client takes; both must divide by what their loss was multiplied with."""
    monkeypatch.setattr(LossScale, "for_dtype", lambda dtype: LossScale(value=8.0, dynamic=True, grow_every=2))
    train = {"schedule": "serial", "aggregation": "none", "clients": 2, "max_steps": 8, "learning_rate": 1e-3}
    half = ModelConfig(name_or_path="tiny-llama", dtype="float16")
    run_split(tiny(model=half, **train), tmp_path / "half")
    monkeypatch.undo()
    run_split(tiny(**train), tmp_path / "full")
    assert grad_norms(tmp_path / "half") == pytest.approx(grad_norms(tmp_path / "full"), rel=3e-2)


def test_trunk_dropout_follows_the_seed(tmp_path: Path) -> None:
    adapter = AdapterConfig(lora_r=4, lora_dropout=0.5, parts=["trunk"])
    config = Config(**{**vars(tiny(schedule="serial", clients=1, max_steps=4)), "adapter": adapter})
    without = Config(**{**vars(config), "adapter": AdapterConfig(lora_r=4, parts=["trunk"])})
    first = run_split(config, tmp_path / "a")
    assert_same_bits(first, run_split(config, tmp_path / "b"))
    assert first.losses != run_split(without, tmp_path / "c").losses


def test_activation_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    from hpc.config import TrunkConfig

    config = tiny(schedule="client_batch", max_steps=4)
    recomputed = Config(**{**vars(config), "trunk": TrunkConfig(activation_checkpointing=True)})
    assert_same_bits(run_split(config, tmp_path / "a"), run_split(recomputed, tmp_path / "b"))


def test_a_loss_that_is_not_finite_stops_everybody_and_names_the_client(tmp_path: Path) -> None:
    with pytest.raises(NonFinite, match=r"step \d+: client 0: the .* not finite; client 1: the .* nobody stepped"):
        run_split(tiny(schedule="client_batch", learning_rate=1e30, max_grad_norm=0.0), tmp_path)
