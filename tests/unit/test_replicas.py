"""Replicas against the plain computation: one ordinary part with PEFT's layers for each client, one pass for each.

Shape suffixes: K clients, N values of one client, B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, Qwen2MoeConfig

from hpc.checkpoint import checkpoint_folder, read_role, write_role
from hpc.config import AdapterConfig, Config, ModelConfig, TrainConfig, TrunkConfig
from hpc.errors import ModelError
from hpc.model.adapters import attach_adapter
from hpc.model.build import ModelBuilder
from hpc.model.part import Part
from hpc.model.replicas import ReplicaLora, Replicas
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.optim import clip_factor
from hpc.replica_trunk import ReplicaTrunk, replica_bytes
from hpc.source.cut import Cut
from hpc.source.files import FileResolver
from hpc.trunk import Trunk
from tests.loopback import one_rank_group

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract"),
]

CPU = torch.device("cpu")
TOKENS = 5
ADAPTERS = {
    "lora": AdapterConfig(lora_r=4, lora_alpha=12),
    "lora_some": AdapterConfig(lora_r=3, target_modules=["q_proj", "down_proj"]),
    "prefix": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=6),
    "projection": AdapterConfig(method="p_tuning_v2", num_virtual_tokens=6, prefix_projection=True),
    "full": AdapterConfig(method="full"),
}
Groups = Sequence[tuple[int, int]]
# (client ids of this rank, groups of one pass); ids are not positions.
PASSES: list[tuple[list[int], Groups]] = [
    ([0], [(0, 3)]),
    ([1, 3], [(1, 1), (3, 1)]),
    ([1, 3], [(3, 2), (1, 3)]),
    ([1, 3], [(3, 2)]),
    ([0, 2, 4], [(4, 2), (0, 2), (2, 2)]),
    ([0, 2, 4], [(0, 1), (4, 2), (0, 2)]),
    ([0, 1, 2, 3, 4], [(k, 1) for k in range(5)]),
    ([0, 1, 2, 3, 4], [(4, 1), (2, 3), (0, 1), (3, 2), (1, 1)]),
]


def tiny(adapter: str | AdapterConfig = "lora", *, dtype: Any = "float32", checkpointing: bool = False) -> Config:
    return Config(
        model=ModelConfig(name_or_path="tiny-llama", dtype=dtype),
        adapter=ADAPTERS[adapter] if isinstance(adapter, str) else adapter,
        train=TrainConfig(learning_rate=1e-2, weight_decay=0.1),
        trunk=TrunkConfig(activation_checkpointing=checkpointing),
    )


MADE: dict[str, Part] = {}


@cache
def builder() -> ModelBuilder:
    return ModelBuilder.of(tiny())


def trunk_part(config: Config) -> Part:
    """A fresh copy of the ordinary part of this configuration."""
    key = f"{config.adapter} {config.model}"
    if key not in MADE:
        MADE[key] = dataclasses.replace(builder(), config=config).part("trunk")
    return copy.deepcopy(MADE[key])


@torch.no_grad()
def stir(part: Part, client: int) -> Part:
    """Values of a client's own; LoRA's B factors, which start at 0, would hide mistakes."""
    for index, parameter in enumerate(part.trainable().values()):
        generator = torch.Generator().manual_seed(1000 * client + index)
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return part


def plain_parts(make: Callable[[], Part], clients: Sequence[int]) -> dict[int, Part]:
    return {client: stir(make(), client) for client in clients}


def values_of(part: Part) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in part.trainable().items()}


def replicas_like(make: Callable[[], Part], parts: dict[int, Part]) -> Replicas:
    replicas = Replicas(make(), list(parts), device=CPU)
    for client, part in parts.items():
        replicas.load(client, values_of(part))
    return replicas


def rows_for(groups: Groups, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and the gradient of the output."""
    shape, generator = (sum(n for _, n in groups), TOKENS, 64), torch.Generator().manual_seed(seed)
    hidden, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return hidden, grad


def run_plain(parts: dict[int, Part], groups: Groups, hidden_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> Any:
    """Output and input gradient, client after client; the parts' gradients add up in the parts."""
    sizes, outs, grads = [n for _, n in groups], [], []
    for (client, _), rows, grad in zip(groups, hidden_BTD.split(sizes), grad_BTD.split(sizes), strict=True):
        own = rows.clone().requires_grad_(True)
        out = parts[client](own)
        out.backward(grad)
        outs.append(out.detach())
        grads.append(own.grad)
    return torch.cat(outs), torch.cat(grads)


def run_replicas(replicas: Replicas, groups: Groups, hidden_BTD: torch.Tensor, grad_BTD: torch.Tensor) -> Any:
    own = hidden_BTD.clone().requires_grad_(True)
    out = replicas.forward(own, groups)
    out.backward(grad_BTD)
    return out.detach(), own.grad


def gradients(replicas: Replicas, client: int) -> dict[str, torch.Tensor]:
    return replicas.split(replicas.grads_KN[replicas.clients.index(client)])


def assert_near(found: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = 2e-5) -> None:
    """Within `tolerance` of the largest expected value: sums over rows and tokens have another order."""
    error = float((found.float() - expected.float()).abs().max())
    assert error <= tolerance * float(expected.float().abs().max()), f"{what}: {error}"


def assert_alike(replicas: Replicas, parts: dict[int, Part], **kwargs: Any) -> None:
    """The same gradients as the parts'."""
    for client, part in parts.items():
        for name, parameter in part.trainable().items():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_near(gradients(replicas, client)[name], expected, f"client {client}, {name}", **kwargs)


@pytest.mark.parametrize(("clients", "groups"), PASSES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_outputs_and_gradients_equal_separate_passes(adapter: str, clients: list[int], groups: Groups) -> None:
    config = tiny(adapter)
    parts = plain_parts(lambda: trunk_part(config), clients)
    replicas = replicas_like(lambda: trunk_part(config), parts)
    assert replicas.names == list(next(iter(parts.values())).trainable())
    for seed in range(2):  # gradients add up over passes
        hidden, grad = rows_for(groups, seed)
        out, grad_hidden = run_replicas(replicas, groups, hidden, grad)
        expected, expected_grad = run_plain(parts, groups, hidden, grad)
        assert_near(out, expected, "output")
        assert_near(grad_hidden, expected_grad, "input gradient")
        assert_alike(replicas, parts)
    taking_part = {client for client, _ in groups}
    assert all(bool(gradients(replicas, c)[replicas.names[0]].any()) == (c in taking_part) for c in clients)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_client_has_the_bits_of_an_ordinary_part(adapter: str, dtype: str) -> None:
    config, groups = tiny(adapter, dtype=dtype), [(7, 3)]
    parts = plain_parts(lambda: trunk_part(config), [7])
    replicas = replicas_like(lambda: trunk_part(config), parts)
    hidden, grad = rows_for(groups, dtype=getattr(torch, dtype))
    out, grad_hidden = run_replicas(replicas, groups, hidden, grad)
    expected, expected_grad = run_plain(parts, groups, hidden, grad)
    assert out.dtype == expected.dtype == getattr(torch, dtype)
    assert torch.equal(out, expected)
    assert torch.equal(grad_hidden, expected_grad)
    for name, parameter in parts[7].trainable().items():
        assert torch.equal(gradients(replicas, 7)[name], parameter.grad), name


@pytest.mark.parametrize("adapter", ["lora", "prefix", "full"])
def test_half_precision_is_near(adapter: str) -> None:
    config, groups = tiny(adapter, dtype="bfloat16"), [(2, 1), (0, 2)]
    parts = plain_parts(lambda: trunk_part(config), [0, 2])
    replicas = replicas_like(lambda: trunk_part(config), parts)
    hidden, grad = rows_for(groups, dtype=torch.bfloat16)
    out, _ = run_replicas(replicas, groups, hidden, grad)
    assert_near(out, run_plain(parts, groups, hidden, grad)[0], tolerance=2e-2)
    assert_alike(replicas, parts, tolerance=3e-2)
    assert replicas.values_KN.dtype == torch.float32


def family_part(folder: Path) -> Part:
    """The trunk, with LoRA in every linear layer."""
    config, cut = AutoConfig.from_pretrained(folder), Cut(blocks=3, head_blocks=1, tail_blocks=0)
    part = build_part(config, cut.part("trunk"), WeightSource(FileResolver(str(folder))), dtype=torch.float32)
    attach_adapter(part, AdapterConfig(lora_r=4), cut, seed=3)
    return part.eval()  # gpt2 has dropout of its own


GPT2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=50, bos_token_id=0, eos_token_id=0)
MOE = Qwen2MoeConfig(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=50,
    intermediate_size=64, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=3,
    num_experts_per_tok=2, decoder_sparse_step=2,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(("config", "layer"), [(GPT2, "c_attn"), (MOE, "shared_expert_gate")], ids=["gpt2", "moe"])
def test_layers_of_other_families(tmp_path: Path, config: Any, layer: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    groups = [(1, 2), (0, 1)]
    parts = plain_parts(lambda: family_part(tmp_path), [0, 1])
    replicas = replicas_like(lambda: family_part(tmp_path), parts)
    assert any(layer in name for name in replicas.names)
    hidden, grad = rows_for(groups)
    assert_near(run_replicas(replicas, groups, hidden, grad)[0], run_plain(parts, groups, hidden, grad)[0])
    assert_alike(replicas, parts)


def test_a_gradient_that_is_not_finite_stays_with_its_client() -> None:
    replicas = replicas_like(lambda: trunk_part(tiny()), plain_parts(lambda: trunk_part(tiny()), [0, 1]))
    for groups in ([(0, 1), (1, 1)], [(0, 1), (1, 2)]):
        hidden, grad = rows_for(groups)
        grad[0] = torch.nan
        run_replicas(replicas, groups, hidden, grad)
    assert replicas.grads_KN[0].isnan().any()
    assert replicas.grads_KN[1].isfinite().all()


# Memory


def stacked_of(replicas: Replicas) -> list[Any]:
    lora = [m for m in replicas.part.modules() if isinstance(m, ReplicaLora)]
    return [side for module in lora for side in (module.down, module.up)]


@pytest.mark.parametrize("groups", [[(0, 2), (1, 2), (2, 2)], [(1, 2), (0, 1)], [(2, 1)]])
def test_autograd_accumulates_in_place(groups: Groups) -> None:
    replicas = replicas_like(lambda: trunk_part(tiny()), plain_parts(lambda: trunk_part(tiny()), [0, 1, 2]))
    stacked = stacked_of(replicas)
    assert 2 * len(stacked) == 2 * len(replicas.names)
    leaves = [leaf for one in stacked for leaf in (one.all_KX, *one.each_X)]
    before = [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in leaves]
    for _ in range(2):
        run_replicas(replicas, groups, *rows_for(groups))
    assert before == [(leaf.data_ptr(), leaf.grad.data_ptr()) for leaf in leaves]
    for leaf in leaves:
        assert leaf.is_leaf
        assert leaf.untyped_storage().data_ptr() == replicas.values_KN.untyped_storage().data_ptr()
        assert leaf.grad.untyped_storage().data_ptr() == replicas.grads_KN.untyped_storage().data_ptr()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_base_is_held_once(adapter: str) -> None:
    config = tiny(adapter)
    ordinary = trunk_part(config)
    learning = sum(p.numel() for p in ordinary.trainable().values())
    base = sum(p.numel() for p in ordinary.parameters()) - learning
    trunk = ReplicaTrunk(trunk_part(config), config, clients=range(8), device=CPU)
    assert sum(p.numel() for p in trunk.part.parameters()) == base
    assert not any(p.requires_grad for p in trunk.part.parameters())
    assert (trunk.trainable, trunk.owned, trunk.learns) == (8 * learning, base + 8 * learning, True)
    groups = [(k, 1) for k in range(8)]
    trunk.forward(rows_for(groups)[0], groups, input_learns=True)
    trunk.backward(rows_for(groups)[1])
    for client in range(8):
        trunk.step(client, factor=1.0, rate=1e-3)
    replicas = trunk._replicas
    moments = [o.state[trunk._rows[c]][key] for c, o in trunk._optimisers.items() for key in ("exp_avg", "exp_avg_sq")]
    stored = {t.untyped_storage().data_ptr(): t.nbytes for t in (replicas.values_KN, replicas.grads_KN, *moments)}
    assert sum(stored.values()) == replica_bytes(learning, 8) == 8 * learning * 16
    assert sum(p.numel() for p in trunk.part.parameters()) == base


# Passes that go wrong, and passes that are run again


def test_groups_must_be_the_rows() -> None:
    replicas = Replicas(trunk_part(tiny()), [0, 2], device=CPU)
    hidden, _ = rows_for([(0, 3)])
    for wrong in ([(0, 2)], [(0, 2), (2, 2)], [(0, 3), (2, 0)], []):
        with pytest.raises(ValueError, match="rows for a batch of 3"):
            replicas.forward(hidden, wrong)
    with pytest.raises(KeyError):
        replicas.forward(hidden, [(1, 3)])


@pytest.mark.parametrize("adapter", ["lora", "prefix", "full"])
def test_a_failed_pass_leaves_nothing_behind(adapter: str) -> None:
    groups = [(1, 1), (0, 1)]
    parts = plain_parts(lambda: trunk_part(tiny(adapter)), [0, 1])
    replicas = replicas_like(lambda: trunk_part(tiny(adapter)), parts)
    with pytest.raises(RuntimeError):
        replicas.forward(torch.randn(2, TOKENS, 63), groups)
    with pytest.raises(RuntimeError):
        replicas.part(rows_for(groups)[0])
    assert_near(run_replicas(replicas, groups, *rows_for(groups))[0], run_plain(parts, groups, *rows_for(groups))[0])


def test_a_layer_that_sees_picked_tokens_is_refused() -> None:
    replicas = Replicas(trunk_part(tiny()), [0, 1], device=CPU)
    layer = replicas.part.blocks[0].mlp
    layer.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[:7],))
    with pytest.raises(ModelError, match=r"mlp\.gate_proj does not see whole rows"):
        replicas.forward(rows_for([(0, 2)])[0], [(0, 1), (1, 1)])


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_activation_checkpointing_changes_no_bit(adapter: str) -> None:
    config = tiny(AdapterConfig(method=ADAPTERS[adapter].method, lora_r=4, lora_dropout=0.3))
    parts = plain_parts(lambda: trunk_part(config), [0, 1, 2])
    passes: list[Groups] = [[(0, 2), (1, 2), (2, 2)], [(2, 1), (0, 3)], [(1, 2)]]

    def run(checkpointing: bool) -> list[torch.Tensor]:
        replicas = replicas_like(lambda: trunk_part(config), parts)
        if checkpointing:
            replicas.checkpoint_activations()
        calls = [0]
        replicas.part.blocks[0].mlp.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        torch.manual_seed(5)
        inputs = [rows_for(groups)[0].requires_grad_(True) for groups in passes]
        outs = [replicas.forward(hidden, groups) for hidden, groups in zip(inputs, passes, strict=True)]
        forwards = calls[0]
        for out, groups in zip(reversed(outs), reversed(passes), strict=True):  # each for its own clients again
            out.backward(rows_for(groups)[1])
        assert (calls[0] > forwards) == checkpointing
        return [*(out.detach() for out in outs), *(i.grad for i in inputs if i.grad is not None), replicas.grads_KN]

    for found, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(found, expected)
        assert expected.any()


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_checkpointing_that_replicas_know_nothing_of_fails_loudly(adapter: str) -> None:
    replicas = Replicas(trunk_part(tiny(adapter)), [0, 1], device=CPU)
    replicas.part.model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(RuntimeError):
        run_replicas(replicas, [(0, 1), (1, 1)], *rows_for([(0, 2)]))


def test_dropout_follows_the_seed() -> None:
    groups = [(0, 2), (1, 2)]

    def run(dropout: float, seed: int) -> torch.Tensor:
        config = tiny(AdapterConfig(lora_r=4, lora_dropout=dropout))
        replicas = replicas_like(lambda: trunk_part(config), plain_parts(lambda: trunk_part(config), [0, 1]))
        torch.manual_seed(seed)
        run_replicas(replicas, groups, *rows_for(groups))
        return replicas.grads_KN

    assert torch.equal(run(0.5, 1), run(0.5, 1))
    assert not torch.equal(run(0.5, 1), run(0.5, 2))
    assert not torch.equal(run(0.5, 1), run(0.0, 1))


# Training


def trained_pair(config: Config, clients: Sequence[int]) -> tuple[ReplicaTrunk, dict[int, Part], dict[int, Any]]:
    """A trunk of replicas, and ordinary parts with an AdamW each that start from the same values."""
    parts = plain_parts(lambda: trunk_part(config), clients)
    trunk = ReplicaTrunk(trunk_part(config), config, clients=clients, device=CPU)
    for client, part in parts.items():
        trunk._replicas.load(client, values_of(part))
    optimisers = {c: torch.optim.AdamW(p.trainable().values(), weight_decay=0.1) for c, p in parts.items()}
    return trunk, parts, optimisers


def plain_step(part: Part, optimiser: Any, factor: float, rate: float) -> None:
    for parameter in part.trainable().values():
        parameter.grad.mul_(factor)
    optimiser.param_groups[0]["lr"] = rate
    optimiser.step()
    optimiser.zero_grad()


# Steps: some clients sit out, in other orders, with unequal rows.
TURNS: list[Groups] = [[(0, 2), (1, 2), (5, 2)], [(5, 1), (0, 3)], [(1, 2)], [(5, 2), (1, 2), (0, 2)], [(0, 1), (5, 2)]]


@pytest.mark.parametrize(
    ("adapter", "checkpointing"), [*((adapter, False) for adapter in ADAPTERS), ("lora", True), ("full", True)]
)
def test_steps_and_averages_equal_plain_training(adapter: str, checkpointing: bool) -> None:
    config = tiny(adapter, checkpointing=checkpointing)
    trunk, parts, optimisers = trained_pair(config, [0, 1, 5])
    runs: list[None] = []
    trunk.part.blocks[0].mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    for turn, groups in enumerate(TURNS):
        runs.clear()
        hidden, grad = rows_for(groups, turn)
        out = trunk.forward(hidden, groups, input_learns=True)
        expected, expected_grad = run_plain(parts, groups, hidden, grad)
        assert_near(out, expected, tolerance=1e-4)
        forwards = len(runs)
        assert_near(trunk.backward(grad), expected_grad, tolerance=1e-4)
        assert len(runs) == forwards * (1 + checkpointing) > 0
        for client, _ in groups:
            square = sum(float(p.grad.square().sum()) for p in parts[client].trainable().values())
            assert trunk.square_sum(client) == pytest.approx(square, rel=1e-4)
            if (turn, client) == (3, 1):
                trunk.skip(client)
                optimisers[client].zero_grad()
                continue
            factor, rate = (0.5, 0.05, 0.2, 1.0, 0.1)[turn] / (1 + client), 1e-3 / (1 + turn)
            trunk.step(client, factor=factor, rate=rate)
            plain_step(parts[client], optimisers[client], factor, rate)
        assert not trunk._replicas.grads_KN.any()
        if turn == 2:
            weights = {0: 3.0, 5: 1.0}
            trunk.average(weights, 4.0, lambda tensor: tensor)
            means = {n: (3 * p + values_of(parts[5])[n]) / 4 for n, p in values_of(parts[0]).items()}
            for part in parts.values():
                part.load_trainable({f"parameter/{name}": mean for name, mean in means.items()})
    for client, part in parts.items():
        for name, value in values_of(part).items():
            assert_near(trunk._replicas.named(client)[name], value, f"client {client}, {name}", tolerance=1e-4)
    steps = {client: int(trunk.state()[f"replica-{client}/step"]) for client in parts}
    assert steps == {0: 4, 1: 2, 5: 4}


@pytest.mark.parametrize("adapter", ["lora", "prefix"])
def test_one_client_equals_the_ordinary_trunk(adapter: str) -> None:
    one_rank_group()
    config = tiny(adapter)
    ordinary = Trunk(stir(trunk_part(config), 4), config, ranks=1, device=CPU)
    trunk = ReplicaTrunk(stir(trunk_part(config), 4), config, clients=[4], device=CPU)
    for turn in range(3):
        hidden, grad = rows_for([(4, 3)], turn)
        out = ordinary.forward(hidden, input_learns=True)
        torch.testing.assert_close(trunk.forward(hidden, [(4, 3)], input_learns=True), out, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(trunk.backward(grad), ordinary.backward(grad), rtol=1e-5, atol=1e-6)
        assert trunk.square_sum(4) == pytest.approx(ordinary.square_sum(), rel=1e-5)
        factor = clip_factor(ordinary.square_sum() ** 0.5, 0.5)
        trunk.step(4, factor=factor, rate=1e-3)
        ordinary.step(factor=factor, rate=1e-3)
    for name, parameter in ordinary.part.trainable().items():
        torch.testing.assert_close(trunk._replicas.named(4)[name], parameter.detach(), rtol=1e-6, atol=1e-6)
    groups = [(4, 3)]
    assert torch.equal(trunk.infer(hidden, groups), trunk.forward(hidden, groups, input_learns=False))
    assert not trunk.infer(hidden, groups).requires_grad


def test_the_average_is_over_all_ranks_and_reaches_every_client() -> None:
    """Two ranks and a third without a client; client 3 has no weight, client 9 is nobody's."""
    config, weights, total = tiny(), {0: 5.0, 1: 1.0, 2: 2.5, 9: 0.0}, 8.5
    ranks = [ReplicaTrunk(trunk_part(config), config, clients=c, device=CPU) for c in ([0, 2], [1, 3], [])]
    generator = torch.Generator().manual_seed(2)
    values = {}
    for rank in ranks:
        for k, client in enumerate(rank._replicas.clients):
            rank._replicas.values_KN[k].normal_(generator=generator)
            values[client] = rank._replicas.values_KN[k].clone()
    shares: list[torch.Tensor] = []
    for rank in ranks:
        before = rank._replicas.values_KN.clone()
        rank.average(weights, total, lambda tensor: shares.append(tensor.clone()) or tensor)  # type: ignore[func-returns-value]
        rank._replicas.values_KN.copy_(before)
    assert all(share.dtype == torch.float64 and share.device == CPU for share in shares)
    for rank in ranks:
        rank.average(weights, total, lambda tensor: tensor.copy_(torch.stack(shares).sum(0)))
    expected = sum(values[c].double() * weights[c] for c in (0, 1, 2)) / total
    for rank in ranks:
        assert len(rank._replicas.values_KN) == len(rank._replicas.clients)
        for row in rank._replicas.values_KN:
            torch.testing.assert_close(row, expected.float(), rtol=1e-7, atol=1e-7)
    assert torch.equal(ranks[0]._replicas.values_KN[0], ranks[1]._replicas.values_KN[1])


def train(trunk: ReplicaTrunk, turns: Sequence[int]) -> None:
    for turn in turns:
        groups = TURNS[turn]
        hidden, grad = rows_for(groups, turn)
        trunk.forward(hidden, groups, input_learns=False)
        assert trunk.backward(grad) is None
        for client, _ in groups:
            trunk.step(client, factor=0.5, rate=1e-2)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_goes_on_with_the_same_bits(adapter: str, tmp_path: Path) -> None:
    config, clients, before = tiny(adapter), [0, 1, 5, 6], 2  # client 6 never steps and has no moments
    straight = ReplicaTrunk(trunk_part(config), config, clients=clients, device=CPU)
    train(straight, range(before))
    state = straight.state()
    write_role(tmp_path, before, "trunk", state, {})
    train(straight, range(before, 5))

    resumed = ReplicaTrunk(trunk_part(config), config, clients=clients, device=CPU)
    train(resumed, [3])  # whatever it did before is forgotten
    resumed.step(6, factor=1.0, rate=1e-2)
    read, _ = read_role(checkpoint_folder(tmp_path, before), "trunk")
    resumed.load_state({**read, "replica-2/step": torch.tensor(1.0)})
    assert resumed.state().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.state().items())
    train(resumed, range(before, 5))
    for name, tensor in straight.state().items():
        assert torch.equal(resumed.state()[name], tensor), name
    assert "replica-6/step" not in state
    assert f"replica-6/parameter/{straight._replicas.names[0]}" in state


@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "full"])
def test_a_frozen_trunk_passes_gradients_on(method: Any) -> None:
    config = tiny(AdapterConfig(method=method, num_virtual_tokens=6, parts=["head"]))
    trunk = ReplicaTrunk(trunk_part(config), config, clients=[0, 1], device=CPU)
    assert (trunk.learns, trunk.trainable, trunk.state()) == (False, 0, {})
    groups = [(1, 2), (0, 1)]
    hidden, grad = rows_for(groups)
    out = trunk.forward(hidden, groups, input_learns=True)
    grad_hidden = trunk.backward(grad)
    expected, expected_grad = run_plain(dict.fromkeys([0, 1], trunk_part(config)), groups, hidden, grad)
    assert_near(out, expected)
    assert_near(grad_hidden, expected_grad)
    trunk.step(0, factor=1.0, rate=1.0)
    trunk.skip(1)
    trunk.average({0: 1.0}, 1.0, lambda tensor: tensor)
    trunk.load_state({})
    assert trunk.square_sum(0) == 0.0
    trunk.forward(hidden, groups, input_learns=False)
    assert trunk.backward(grad) is None
