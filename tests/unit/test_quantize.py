"""A quantised trunk computes what plain transformers and PEFT compute with the weights that the library dequantises.

Shape suffixes: B rows, T tokens, D hidden size.
"""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hpc.quantizer
from hpc.agreement import agreement
from hpc.checkpoint import commit
from hpc.config import AdapterConfig, Config, ModelConfig, TrunkConfig
from hpc.errors import CheckpointError, ConfigError, ModelError
from hpc.model import quantized_linear
from hpc.model.build import ModelBuilder, count_parameters
from hpc.model.part import Part
from hpc.model.pretrained import load_tokenizer
from hpc.model.quantize import quantize_part
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.preflight import check
from hpc.resume import find
from hpc.source.cut import Cut
from hpc.source.files import FileResolver
from tests import plain, plain_federated
from tests.loopback import run_centralised, run_split
from tests.plain import plain_run
from tests.plain_federated import simulate
from tests.unit.test_equalities import assert_close, assert_same_bits, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

KINDS = ["int8", "nf4"]
BLOCKS, TRUNK = 4, range(1, 3)
TEXT = (
    "The capital of France is Paris, which is also its largest city. It lies on the river Seine, in the north of the "
    "country, and has been an important centre of finance, diplomacy, commerce, fashion and science since the "
    "seventeenth century. More than two million people live in the city itself."
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def dequantised(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight as the library's own functions round it, in float32."""
    if kind == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(codes, scales)
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))


def round_blocks(model: nn.Module, kind: str, blocks: range = TRUNK) -> None:
    """Dequantised weights in the linear layers of these blocks of a plain model, PEFT's around them or not."""
    for name, module in model.named_modules():
        names = name.removesuffix(".base_layer").split(".")
        if names[-1] in LINEAR and int(names[names.index("layers") + 1]) in blocks and isinstance(module, nn.Linear):
            module.weight.data = dequantised(module.weight.data, kind).to(module.weight.dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of realistic sizes, where scales and norms weigh as little as in a large model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def built(folder: Path, kind: Any, dtype: Any = "float32", adapter: AdapterConfig | None = None) -> ModelBuilder:
    return ModelBuilder.of(
        Config(
            model=ModelConfig(name_or_path=str(folder), dtype=dtype),
            adapter=adapter or AdapterConfig(lora_r=4),
            trunk=TrunkConfig(quantization=kind),
        )
    )


@pytest.fixture(scope="module")
def ids_BT() -> torch.Tensor:
    return torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(1))


def put_factors(parameters: dict[str, nn.Parameter]) -> None:
    """LoRA factors away from B = 0, the same by name on both sides."""
    with torch.no_grad():
        for name in sorted(parameters):
            draw = torch.Generator().manual_seed(sum(name.encode()))
            parameters[name].copy_(torch.randn(parameters[name].shape, generator=draw) * 0.05)


def plain_llama(folder: Path, kind: str, dtype: torch.dtype) -> Any:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    round_blocks(model, kind)
    settings = LoraConfig(r=4, lora_alpha=16, target_modules=LINEAR, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_gradients_equal_plain_peft_on_dequantised_weights(
    folder: Path, ids_BT: torch.Tensor, kind: str, dtype: str
) -> None:
    model = plain_llama(folder, kind, getattr(torch, dtype))
    learning = {name.removeprefix("base_model."): p for name, p in model.named_parameters() if p.requires_grad}
    put_factors(learning)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output
            kept[name].retain_grad()

        return hook

    layers = model.base_model.model.model.layers
    layers[0].register_forward_hook(keep("smashed"))
    layers[TRUNK[-1]].register_forward_hook(keep("trunk_out"))
    logits = model(input_ids=ids_BT).logits
    logits.float().square().mean().backward()

    builder = built(folder, kind, dtype)
    head, trunk, tail = (builder.part(each) for each in ("head", "trunk", "tail"))
    found = {name: p for part in (head, trunk, tail) for name, p in part.trainable().items()}
    put_factors(found)
    assert all(p.dtype == torch.float32 for p in found.values())
    smashed_BTD = head(ids_BT).detach().requires_grad_(True)
    out_BTD = trunk(smashed_BTD)
    tail(out_BTD).float().square().mean().backward()

    bound = {"float32": 1e-5, "bfloat16": 2e-2}[dtype]  # bfloat16 has three digits
    assert relative_error(out_BTD, kept["trunk_out"]) < bound
    assert relative_error(smashed_BTD.grad, kept["smashed"].grad) < bound
    assert trunk.trainable().keys() == {name for name in learning if int(name.split(".layers.")[1][0]) in TRUNK}
    for name, parameter in trunk.trainable().items():
        assert relative_error(parameter.grad, learning[name].grad) < bound, name


def relative_error(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    assert found is not None
    assert expected is not None
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.02), ("nf4", 0.2)])
def test_error_against_the_unquantised_model_is_bounded(
    folder: Path, ids_BT: torch.Tensor, kind: str, bound: float
) -> None:
    logits = built(folder, kind).part("whole")(ids_BT)
    exact = LlamaForCausalLM.from_pretrained(folder)(input_ids=ids_BT).logits
    assert 0 < relative_error(logits, exact) < bound


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.05), ("nf4", 0.25)])
def test_the_default_model_stays_as_good(kind: Any, bound: float) -> None:
    """Nats a token of a plain English text, against the unquantised model's."""
    losses = []
    for quantization in ("none", kind):
        builder = ModelBuilder.of(Config(trunk=TrunkConfig(quantization=quantization)))
        ids_BT = torch.tensor([load_tokenizer(builder.resolver)(TEXT).input_ids])
        with torch.no_grad():
            logits_BTV = builder.part("whole")(ids_BT)
        losses.append(float(nn.functional.cross_entropy(logits_BTV[0, :-1], ids_BT[0, 1:])))
    assert losses[0] != losses[1] == pytest.approx(losses[0], abs=bound)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_and_cut_model_quantise_the_same_blocks(folder: Path, ids_BT: torch.Tensor, kind: str) -> None:
    builder = built(folder, kind)
    whole, head, trunk, tail = (builder.part(each) for each in ("whole", "head", "trunk", "tail"))
    assert torch.equal(tail(trunk(head(ids_BT))), whole(ids_BT))
    assert [any(is_quantised(m) for m in block.modules()) for block in whole.blocks] == [False, True, True, False]
    assert not any(is_quantised(m) for part in (head, tail) for m in part.modules())
    assert sum(is_quantised(m) for m in trunk.modules()) == len(TRUNK) * len(LINEAR)


def is_quantised(module: nn.Module) -> bool:
    return isinstance(module, quantized_linear.Int8Linear | quantized_linear.Nf4Linear)


@pytest.mark.parametrize(("kind", "fraction"), [("int8", 0.30), ("nf4", 0.17)])
def test_the_blocks_take_a_fraction_of_the_memory(folder: Path, kind: str, fraction: float) -> None:
    prefix = AdapterConfig(method="p_tuning_v2", num_virtual_tokens=1)
    plain_part, part = (built(folder, each, adapter=prefix).part("trunk") for each in ("none", kind))
    assert held_bytes(part) <= fraction * sum(p.nbytes for p in plain_part.blocks.parameters())
    assert count_parameters(part) == count_parameters(plain_part)


def held_bytes(part: Part) -> int:
    """All that the blocks hold: parameters, buffers, and what the library keeps beside them."""
    tensors: list[Any] = [*part.blocks.parameters(), *part.blocks.buffers()]
    for module in part.blocks.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        tensors += [getattr(getattr(module, "weight", None), name, None) for name in ("CB", "SCB")]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t is not None}.values())


def test_each_layer_is_freed_before_the_next_is_quantised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals: list[Any] = []
    alive: list[int] = []

    class Watched(quantized_linear.Nf4Linear):
        def __init__(self, linear: nn.Linear) -> None:
            alive.append(sum(each() is not None for each in originals))
            originals.append(weakref.ref(linear.weight))
            super().__init__(linear)

    monkeypatch.setattr(quantized_linear, "Nf4Linear", Watched)
    built(folder, "nf4").part("trunk")
    assert len(alive) == len(TRUNK) * len(LINEAR)
    assert max(alive) <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_computes_what_training_does_and_leaves_no_trace(folder: Path, kind: str) -> None:
    part = built(folder, kind, adapter=AdapterConfig(parts=["head"])).part("trunk")
    hidden_BTD = torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(2))
    before = part(hidden_BTD)
    with torch.no_grad():
        assert torch.equal(part.eval()(hidden_BTD), before)
    after = part.train()(hidden_BTD.requires_grad_(True))
    assert torch.equal(after, before)
    after.sum().backward()
    assert hidden_BTD.grad is not None
    assert hidden_BTD.grad.abs().max() > 0


# Whole runs.


def quantised_run(kind: Any, adapter: str = "lora", *, trunk: dict[str, Any] | None = None, **train: Any) -> Config:
    values = {"clients": 2, "max_steps": 10, "adam_epsilon": 1e-3, "learning_rate": 3e-3, **train}
    return replace(tiny(adapter, **values), trunk=TrunkConfig(quantization=kind, **(trunk or {})))


@pytest.fixture
def plain_is_rounded(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Afterwards the plain model has dequantised weights where the trunk is."""
    make = plain.plain_model

    def start(kind: str) -> None:
        def rounded(config: Config, builder: ModelBuilder) -> Any:
            model = make(config, builder)
            round_blocks(model, kind)
            return model

        for module in (plain, plain_federated):
            monkeypatch.setattr(module, "plain_model", rounded)

    return start


@pytest.mark.parametrize(("kind", "adapter"), [("int8", "lora"), ("nf4", "lora"), ("nf4", "p_tuning_v2")])
def test_training_equals_plain_training_on_dequantised_weights(
    kind: str, adapter: str, plain_is_rounded: Callable[[str], None], tmp_path: Path
) -> None:
    config = quantised_run(kind, adapter, schedule="client_batch")
    split = run_split(config, tmp_path)
    plain_is_rounded(kind)
    assert_close(split.losses, plain_run(config, [[0, 1]] * 10)[0])
    assert all(map(math.isfinite, split.losses))
    assert sum(split.losses[-3:]) / 3 < split.losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_equal_plain_federated_training_on_dequantised_weights(
    kind: str, plain_is_rounded: Callable[[str], None], tmp_path: Path
) -> None:
    config = quantised_run(kind, schedule="replica", sync_every=2, max_steps=3)
    split = run_split(config, tmp_path)
    plain_is_rounded(kind)
    assert_close(split.losses, simulate(config).losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_baseline_is_quantised_alike(kind: str, tmp_path: Path) -> None:
    split = run_split(quantised_run(kind, schedule="serial", clients=1, max_steps=3), tmp_path / "split")
    whole = run_centralised(quantised_run(kind, schedule="centralised", clients=1, max_steps=3), tmp_path / "whole")
    assert_same_bits(split, whole)


@pytest.mark.parametrize(("kind", "schedule"), [("int8", "client_batch"), ("nf4", "client_batch"), ("nf4", "replica")])
def test_activation_checkpointing_changes_no_bit(kind: str, schedule: str, tmp_path: Path) -> None:
    kept, recomputed = (
        run_split(
            quantised_run(kind, schedule=schedule, max_steps=3, trunk={"activation_checkpointing": on}),
            tmp_path / str(on),
        )
        for on in (False, True)
    )
    assert_same_bits(kept, recomputed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_keeps_no_input_of_a_quantised_layer(folder: Path, kind: str, on: bool) -> None:
    part = built(folder, kind).part("trunk")
    inputs: list[Any] = []
    for module in part.modules():
        if is_quantised(module):
            module.register_forward_pre_hook(lambda module, args: inputs.append(weakref.ref(args[0])))
    if on:
        part.model.gradient_checkpointing_enable({"use_reentrant": False})
        part.train()
    out_BTD = part(torch.randn(1, 4, 512).requires_grad_(True))
    gc.collect()
    alive = sum(each() is not None for each in inputs)
    assert len(inputs) == len(TRUNK) * len(LINEAR)
    assert (alive == 0) == on
    out_BTD.sum().backward()


@pytest.mark.parametrize(("kind", "stage"), [("int8", 2), ("nf4", 1), ("nf4", 3)])
def test_every_zero_stage_trains_alike(kind: str, stage: int, tmp_path: Path) -> None:
    settings = tmp_path / "zero.json"
    whole = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}  # else small weights stay whole
    settings.write_text(json.dumps({"zero_optimization": {"stage": stage, **whole}}))
    with_zero = quantised_run(kind, max_steps=2, trunk={"deepspeed": str(settings)})
    check(with_zero)
    partitioned = run_split(with_zero, tmp_path / "zero")
    assert_close(partitioned.losses, run_split(quantised_run(kind, max_steps=2), tmp_path / "plain").losses, later=1e-6)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    config = quantised_run("nf4", max_steps=5, save_every=2)
    whole = run_split(config, tmp_path)
    for path in tmp_path.glob("roles/*/metrics.jsonl"):
        path.unlink()
    assert run_split(config, tmp_path, start=2).losses == whole.losses[2:]


# Refusals.


def test_a_trunk_that_trains_its_weights_is_refused() -> None:
    full = AdapterConfig(method="full")
    with pytest.raises(ConfigError, match=r"--trunk.quantization nf4 .*--adapter.method full.*--adapter.parts"):
        Config(adapter=full, trunk=TrunkConfig(quantization="nf4"))
    Config(adapter=replace(full, parts=["head", "tail"]), trunk=TrunkConfig(quantization="nf4"))


def test_int8_with_zero_3_is_refused(tmp_path: Path) -> None:
    settings = tmp_path / "zero.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(ConfigError, match=r"ZeRO stage 3.*--trunk.quantization int8.*nf4, or a lower stage"):
        check(quantised_run("int8", trunk={"deepspeed": str(settings)}))


def test_a_missing_library_is_named_with_its_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hpc.quantizer, "find_spec", lambda name: None)
    message = r"--trunk.quantization int8 needs the package bitsandbytes.*pip install -c constraints.txt bitsandbytes"
    with pytest.raises(ConfigError, match=message):
        check(quantised_run("int8"))
    with pytest.raises(ConfigError, match=message):
        built(folder, "int8").part("trunk")
    built(folder, "int8").part("tail")


def test_a_family_without_linear_layers_is_refused(tmp_path: Path) -> None:
    gpt2 = GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=50, n_positions=16)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path)
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    part = build_part(gpt2, cut.part("trunk"), WeightSource(FileResolver(str(tmp_path))), dtype=torch.float32)
    with pytest.raises(ModelError, match=r"--trunk.quantization nf4 .* 100% .* in others, most in Conv1D"):
        quantize_part(part, "nf4", cut)


def test_a_checkpoint_of_another_quantisation_is_refused(tmp_path: Path) -> None:
    commit(tmp_path, 2, agreement(quantised_run("none")))
    with pytest.raises(CheckpointError, match=r"trunk\.quantization: then none, now nf4"):
        find(tmp_path, "latest", agreement(quantised_run("nf4")))
