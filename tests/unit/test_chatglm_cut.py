"""ChatGLM cut by the generic mechanism equals values recorded from the published code; the trunk sees no token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from hpc.config import AdapterConfig, Config, ModelConfig
from hpc.errors import ConfigError
from hpc.model.adapters import Prefix, attach_adapter
from hpc.model.build import ModelBuilder
from hpc.model.chatglm.prefix import prefix_of_blocks
from hpc.model.part import Part
from hpc.model.pretrained import load_hf_config
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source.cut import Cut, PartKind
from hpc.source.files import FileResolver

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "chatglm"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs shared/golden/chatglm beside the repository")

MODEL = ModelConfig(name_or_path=str(GOLDEN / "prefix"))
LAYOUT_B2 = torch.tensor([[7, 8], [4, 5], [10, 11]])  # of the recorded rows: mask token's place, context length
KINDS: tuple[PartKind, ...] = ("head", "trunk", "tail")
LOGIT, GRADIENT = 2e-6, 2e-7  # as in test_chatglm.py
CUTS = [(1, 1), (0, 0), (2, 1), (0, 2)]


def parts_of(variant: str, cut: Cut) -> list[Part]:
    """Each part on its own files' tensors."""
    resolver = FileResolver(str(GOLDEN / variant))
    config = load_hf_config(resolver)
    config.pre_seq_len = None
    return [build_part(config, cut.part(kind), WeightSource(resolver), dtype=torch.float32) for kind in KINDS]


def through(parts: list[Part], hidden: torch.Tensor) -> torch.Tensor:
    layout_B2 = parts[0].layout_of(hidden)
    assert layout_B2 is not None
    assert torch.equal(layout_B2, LAYOUT_B2)
    for part in parts:
        hidden = part(hidden, layout_B2=layout_B2)
    return hidden


def run_and_backward(parts: list[Part], golden: dict[str, torch.Tensor]) -> None:
    logits_BTV = through(parts, golden["input_ids"])
    torch.testing.assert_close(logits_BTV, golden["logits"], rtol=0, atol=LOGIT)
    functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), golden["labels"][:, 1:].flatten()).backward()


@pytest.mark.parametrize(("head_blocks", "tail_blocks"), CUTS)
def test_logits_and_gradients_are_the_recorded_ones(head_blocks: int, tail_blocks: int) -> None:
    golden = load_file(GOLDEN / "base" / "expected.safetensors")
    parts = parts_of("base", Cut(blocks=4, head_blocks=head_blocks, tail_blocks=tail_blocks))
    for part in parts:
        part.requires_grad_(True)
    run_and_backward(parts, golden)
    gradients = {f"grad.{name}": p.grad for part in parts for name, p in part.trainable().items()}
    gradients = {name.replace("grad.model.", "grad."): gradient for name, gradient in gradients.items()}
    assert set(gradients) == {key for key in golden if key.startswith("grad.")}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, golden[key], rtol=0, atol=GRADIENT)


@pytest.mark.parametrize(("head_blocks", "tail_blocks"), CUTS)
def test_each_part_takes_its_share_of_the_published_prefix(head_blocks: int, tail_blocks: int) -> None:
    golden = load_file(GOLDEN / "prefix" / "expected.safetensors")
    published = load_file(GOLDEN / "prefix" / "model.safetensors")
    cut = Cut(blocks=4, head_blocks=head_blocks, tail_blocks=tail_blocks)
    parts = parts_of("prefix", cut)
    tables = [take_share(part, cut, published) for part in parts if part.spec.blocks]
    run_and_backward(parts, golden)
    gradient_PC = torch.cat([table.grad for table in tables if table.grad is not None], 1)
    recorded_PC = golden["grad.transformer.prefix_encoder.embedding.weight"]
    torch.testing.assert_close(gradient_PC, recorded_PC, rtol=0, atol=GRADIENT)


def take_share(part: Part, cut: Cut, published: dict[str, torch.Tensor]) -> torch.Tensor:
    """Give the part the project's own adapter with the published values; returns its table."""
    attach_adapter(part, AdapterConfig(method="p_tuning_v2", num_virtual_tokens=5), cut, seed=0)
    assert isinstance(part.prefix, Prefix)
    (encoder,) = part.prefix.encoders.values()
    encoder.load_state_dict(prefix_of_blocks(published, first=part.spec.first, last=part.spec.last, hidden_size=48))
    table: torch.Tensor = encoder.embedding.weight
    return table


@pytest.mark.parametrize("kinds", [KINDS, ("whole",)], ids=["cut", "whole"])
def test_a_published_prefix_is_what_the_adapter_starts_from(kinds: tuple[PartKind, ...]) -> None:
    golden = load_file(GOLDEN / "prefix" / "expected.safetensors")
    builder = ModelBuilder.of(Config(model=MODEL, adapter=AdapterConfig(method="p_tuning_v2", num_virtual_tokens=5)))
    parts = [builder.part(kind, adapted=False) for kind in kinds]  # it belongs to the model
    run_and_backward(parts, golden)


@pytest.mark.parametrize("adapter", [{}, {"method": "p_tuning_v2"}, {"method": "p_tuning_v2", "parts": ["trunk"]}])
def test_a_published_prefix_cannot_be_left_out_unsaid(adapter: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"v2 prefix of 5 tokens .* --adapter.num_virtual_tokens 5"):
        ModelBuilder.of(Config(model=MODEL, adapter=AdapterConfig(**adapter)))
