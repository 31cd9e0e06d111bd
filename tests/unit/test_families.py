"""A model of any family, cut anywhere, equals the uncut one of transformers and PEFT: to the bit, exceptions listed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hpc.config import AdapterConfig
from hpc.model.adapters import attach_adapter
from hpc.model.part import LabelPositions, Part
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source.cut import Cut, PartKind
from hpc.source.files import FileResolver
from tests.families import BLOCKS, FAMILIES, VOCABULARY, Family, make_model

CUT = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
KINDS: tuple[PartKind, ...] = ("head", "trunk", "tail")
CUTS = [(1, 1), (0, 0)]
ALL_CUTS = [*CUTS, (2, 1), (1, 2), (0, 2), (2, 0), (3, 1)]
REPRESENTATIVES = ("llama", "gpt2", "gemma3", "qwen2_moe")
CASES = [(f, *c) for f in FAMILIES for c in (ALL_CUTS if f in REPRESENTATIVES else CUTS)]
PREFIX_TOKENS = 3
LENGTHS = (11, 6, 9)
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(kw_only=True, eq=False)
class Uncut:
    """One family's model as plain transformers and PEFT run it, computed once for all cuts."""

    name: str
    folder: Path
    family: Family

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder).eval()

    @cached_property
    def ids_BT(self) -> torch.Tensor:
        return torch.randint(2, VOCABULARY, (3, max(LENGTHS)), generator=torch.Generator().manual_seed(1))

    @cached_property
    def mask_BT(self) -> torch.Tensor:
        return (torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]).long()

    def loss(self, logits_BTV: torch.Tensor) -> torch.Tensor:
        """Next-token cross-entropy over the valid tokens."""
        predicts = self.mask_BT[:, 1:].bool()
        return nn.functional.cross_entropy(logits_BTV[:, :-1][predicts], self.ids_BT[:, 1:][predicts])

    @cached_property
    def logits_NV(self) -> torch.Tensor:
        with torch.no_grad():
            logits = self.model()(input_ids=self.ids_BT, attention_mask=self.mask_BT, use_cache=False).logits
        return logits[self.mask_BT.bool()]

    @lru_cache  # noqa: B019  # lives as long as the module's fixture
    def lora(self, *, mask: bool) -> tuple[float, dict[str, torch.Tensor]]:
        """Loss and gradients of PEFT's LoRA in every linear layer of the blocks, from `value_of`."""
        from peft import LoraConfig, get_peft_model

        targets, outside_blocks = self.family.lora_targets, ["project_in", "project_out"]
        config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, exclude_modules=outside_blocks)
        model = get_peft_model(self.model(), config).train()
        learns = {n.removeprefix("base_model."): p for n, p in model.named_parameters() if p.requires_grad}
        for name, parameter in learns.items():
            parameter.data.copy_(value_of(name, parameter))
        given = {"attention_mask": self.mask_BT} if mask else {}
        loss = self.loss(model(input_ids=self.ids_BT, use_cache=False, **given).logits)
        loss.backward()
        return float(loss), gradients(learns)

    @lru_cache  # noqa: B019
    def prefix(self, *, mask: bool) -> tuple[float, torch.Tensor]:
        """Loss and gradient of one table for all blocks in PEFT's layout, run as PEFT runs it."""
        model, (heads, width) = self.model().requires_grad_(False), self.family.kv_shape
        table_PK = value_of("prefix", torch.empty(PREFIX_TOKENS, 2 * BLOCKS * heads * width)).requires_grad_()
        kv_2nHPK = table_PK.view(PREFIX_TOKENS, 2 * BLOCKS, heads, width).permute(1, 2, 0, 3)
        cache = DynamicCache(config=model.config)
        for block in range(BLOCKS):
            key, value = (kv.expand(len(LENGTHS), *kv.shape) for kv in kv_2nHPK[2 * block : 2 * block + 2])
            cache.update(key, value, block)
        ones = torch.ones(len(LENGTHS), PREFIX_TOKENS, dtype=torch.long)
        given = {"attention_mask": torch.cat([ones, self.mask_BT], 1)} if mask else {}
        loss = self.loss(model(input_ids=self.ids_BT, past_key_values=cache, **given).logits)
        loss.backward()
        return float(loss), gradient(table_PK)

    @cached_property
    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded ids and their mask."""
        mask_BT = self.mask_BT[:, :7].flip(1)
        mask_BT[1, :3] = 0
        return self.ids_BT[:, :7].flip(1) * mask_BT, mask_BT

    @cached_property
    def greedy(self) -> torch.Tensor:
        ids_BT, mask_BT = self.prompts
        output = self.model().generate(input_ids=ids_BT, attention_mask=mask_BT, do_sample=False, max_new_tokens=6)
        return output[:, ids_BT.shape[1] :]


def value_of(name: str, like: torch.Tensor) -> torch.Tensor:
    """Random, by name: LoRA's own start would hide the A factors behind B factors of 0."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def gradients(learns: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in learns.items()}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Uncut]:
    @lru_cache
    def get(name: str) -> Uncut:
        folder = tmp_path_factory.mktemp(name)
        make_model(name).save_pretrained(folder)
        return Uncut(name=name, folder=folder, family=FAMILIES[name])

    return get


def part_of(uncut: Uncut, cut: Cut, kind: PartKind, adapter: AdapterConfig | None = None) -> Part:
    source = WeightSource(FileResolver(str(uncut.folder)))
    part = build_part(AutoConfig.from_pretrained(uncut.folder), cut.part(kind), source, dtype=torch.float32).eval()
    if adapter is not None:
        attach_adapter(part, adapter, cut, seed=3)
    return part


def cut_model(uncut: Uncut, head: int, tail: int, adapter: AdapterConfig | None = None) -> list[Part]:
    cut = Cut(blocks=BLOCKS, head_blocks=head, tail_blocks=tail)
    return [part_of(uncut, cut, kind, adapter) for kind in KINDS]


def through(parts: list[Part], ids_BT: torch.Tensor, labels: LabelPositions | None = None) -> torch.Tensor:
    head, trunk, tail = parts
    return tail(trunk(head(ids_BT)), labels)


def require_equal(found: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str = "") -> None:
    if tolerance:
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, msg=what or None)
    else:
        assert torch.equal(found, wanted), f"{what} {(found - wanted).abs().max()}"


@pytest.mark.parametrize(("name", "head", "tail"), CASES)
def test_logits_and_greedy_tokens_equal_the_uncut_model(
    uncut: Callable[[str], Uncut], name: str, head: int, tail: int
) -> None:
    whole = uncut(name)
    parts = cut_model(whole, head, tail)
    valid = whole.mask_BT.bool()
    with torch.no_grad():
        require_equal(through(parts, whole.ids_BT)[valid], whole.logits_NV, 0.0)
        row_L, position_L = valid.nonzero(as_tuple=True)
        labels = LabelPositions(row_L=row_L, position_L=position_L)
        require_equal(through(parts, whole.ids_BT, labels), whole.logits_NV, 1e-5)
    assert torch.equal(greedy_through(parts, *whole.prompts), whole.greedy)


def greedy_through(parts: list[Part], ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    memories = [part.remember(len(ids_BT)) for part in parts]
    tokens = []
    for _ in range(6):
        hidden = ids_BT
        for part, memory in zip(parts, memories, strict=True):
            hidden = part.extend(hidden, memory, mask_BT)
        ids_BT = hidden.argmax(-1)[:, None]
        mask_BT = torch.ones_like(ids_BT)
        tokens.append(ids_BT)
    return torch.cat(tokens, 1)


@pytest.mark.parametrize(("name", "head", "tail"), CASES)
def test_lora_gradients_equal_pefts(uncut: Callable[[str], Uncut], name: str, head: int, tail: int) -> None:
    whole = uncut(name)
    parts = cut_model(whole, head, tail, AdapterConfig(lora_r=4, lora_alpha=12))
    for part in parts:
        part.train()  # the dropouts are 0
    ours = {n: p for part in parts for n, p in part.trainable().items()}
    for n, parameter in ours.items():
        parameter.data.copy_(value_of(n, parameter))
    loss = whole.loss(through(parts, whole.ids_BT))
    loss.backward()
    for mask, tolerance in ((False, 0.0), (True, 1e-6)):  # with a mask other kernels run
        wanted_loss, wanted = whole.lora(mask=mask)
        assert ours.keys() == wanted.keys()
        require_equal(loss.detach(), torch.tensor(wanted_loss), tolerance)
        for n, found in gradients(ours).items():
            require_equal(found, wanted[n], tolerance, n)


@pytest.mark.parametrize(("name", "head", "tail"), CASES)
def test_prefix_gradients_equal_the_uncut_model(uncut: Callable[[str], Uncut], name: str, head: int, tail: int) -> None:
    whole = uncut(name)
    parts = cut_model(whole, head, tail, AdapterConfig(method="p_tuning_v2", num_virtual_tokens=PREFIX_TOKENS))
    tables = [table for part in parts for table in part.trainable().values()]
    values = value_of("prefix", torch.empty(PREFIX_TOKENS, sum(t.shape[1] for t in tables)))
    for table, columns in zip(tables, values.split([t.shape[1] for t in tables], 1), strict=True):
        table.data.copy_(columns)
    loss = whole.loss(through(parts, whole.ids_BT))
    loss.backward()
    found = torch.cat([gradient(table) for table in tables], 1)
    for mask, tolerance in ((False, 0.0), (True, 1e-6)):
        wanted_loss, wanted = whole.prefix(mask=mask)
        require_equal(loss.detach(), torch.tensor(wanted_loss), tolerance)
        require_equal(found, wanted, tolerance)


def gradient(parameter: torch.Tensor) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


@pytest.mark.parametrize("name", FAMILIES)
def test_a_part_reads_and_holds_only_its_own(uncut: Callable[[str], Uncut], name: str) -> None:
    whole, cut = uncut(name), Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=2)
    keys: dict[PartKind, set[str]] = {}
    model = whole.model()
    in_blocks = {n: int(number[1]) for n in model.state_dict() if (number := re.search(r"\.(\d+)\.", n))}
    for kind in KINDS:
        source = WeightSource(FileResolver(str(whole.folder)))
        part = build_part(AutoConfig.from_pretrained(whole.folder), cut.part(kind), source, dtype=torch.float32)
        keys[kind] = source.keys_read
        assert source.bytes_read == sum(p.numel() * 4 for p in part.parameters())
        held = {part.whole_name(n).removeprefix("model."): p for n, p in part.named_parameters()}
        for n, parameter in held.items():
            assert torch.equal(parameter, model.state_dict()[n]), n
            assert part.owner(f"model.{n}", cut) == kind or (n == "lm_head.weight" and part.tied)
        assert {n for n in in_blocks if cut.kind_of_block(in_blocks[n]) == kind} == held.keys() & in_blocks.keys()
    assert not keys["trunk"] & (keys["head"] | keys["tail"])
    assert len(keys["head"] & keys["tail"]) == int(model.config.tie_word_embeddings)
    with safe_open(whole.folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set.union(*keys.values())


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("name", ["gpt2", "opt_projected", "bloom", "qwen3", "falcon_new", "qwen2_moe"])
def test_full_gradients_equal_the_uncut_model(uncut: Callable[[str], Uncut], name: str, head: int, tail: int) -> None:
    whole = uncut(name)
    parts = cut_model(whole, head, tail, AdapterConfig(method="full"))
    whole.loss(through(parts, whole.ids_BT)).backward()
    found = {n: g for part in parts for n, g in gradients(part.trainable()).items()}
    model = whole.model()
    whole.loss(model(input_ids=whole.ids_BT, use_cache=False).logits).backward()
    wanted = {f"model.{n}": g for n, g in gradients(dict(model.named_parameters())).items()}
    for n in found.keys() - wanted.keys():  # two copies here; one tensor on a real client
        assert n == "model.lm_head.weight"
        assert parts[0].tied
        (embedding,) = [w for w in wanted if wanted[w].shape == found[n].shape and parts[0].owner(w, CUT) == "head"]
        require_equal(found.pop(embedding) + found.pop(n), wanted.pop(embedding), 1e-6)
    assert found.keys() == wanted.keys()
    for n, gradient_of_n in wanted.items():
        assert torch.equal(found[n], gradient_of_n), n


@pytest.mark.parametrize("name", ["gpt2", "starcoder2", "gpt_neox"])
def test_a_trunk_draws_no_numbers_for_the_embeddings_dropout(tmp_path: Path, name: str) -> None:
    make_model(name).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for dropout in ("embd_pdrop", "embedding_dropout", "hidden_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.5)
    source = WeightSource(FileResolver(str(tmp_path)))
    drawn = []
    for kind in KINDS[:2]:
        part = build_part(config, CUT.part(kind), source, dtype=torch.float32).train()
        for module in part.blocks.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        before = torch.get_rng_state()
        part(torch.zeros(1, 3, dtype=torch.long) if kind == "head" else torch.zeros(1, 3, part.hidden_size))
        drawn.append(not torch.equal(before, torch.get_rng_state()))
    assert drawn == [True, False]
