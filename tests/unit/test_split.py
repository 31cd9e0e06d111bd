"""A model cut anywhere equals the uncut one of transformers and PEFT, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from hpc.config import AdapterConfig
from hpc.errors import ConfigError, ModelError
from hpc.model.adapters import attach_adapter
from hpc.model.part import LabelPositions, Part
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.ragged import pack, pad
from hpc.source.cut import Cut, PartKind
from hpc.source.files import FileResolver

BLOCKS = 5
CUTS = [(1, 1), (0, 0), (2, 1), (0, 2), (3, 1)]
KINDS: tuple[PartKind, ...] = ("head", "trunk", "tail")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        tie_word_embeddings=request.param,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def part_of(folder: Path, cut: Cut, kind: PartKind, adapter: AdapterConfig | None = None) -> Part:
    config = AutoConfig.from_pretrained(folder)
    part = build_part(config, cut.part(kind), WeightSource(FileResolver(str(folder))), dtype=torch.float32)
    if adapter is not None:
        attach_adapter(part, adapter, cut, seed=3)
    return part


def cut_model(folder: Path, cut: Cut, adapter: AdapterConfig | None = None) -> dict[PartKind, Part]:
    return {kind: part_of(folder, cut, kind, adapter) for kind in KINDS}


def through(parts: dict[PartKind, Part], ids_BT: torch.Tensor, labels: LabelPositions | None = None) -> torch.Tensor:
    return parts["tail"](parts["trunk"](parts["head"](ids_BT)), labels)


@pytest.fixture
def ids_BT() -> torch.Tensor:
    return torch.randint(0, 300, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("head", "tail"), CUTS)
def test_logits_equal_the_uncut_model(folder: Path, ids_BT: torch.Tensor, head: int, tail: int) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=head, tail_blocks=tail)
    plain = LlamaForCausalLM.from_pretrained(folder)(input_ids=ids_BT).logits
    assert torch.equal(through(cut_model(folder, cut), ids_BT), plain)
    assert torch.equal(part_of(folder, cut, "whole")(ids_BT), plain)


@pytest.mark.parametrize(("head", "tail"), CUTS)
@pytest.mark.parametrize("method", ["lora", "p_tuning_v2", "full"])
def test_adapter_gradients_equal_the_uncut_part(
    folder: Path, ids_BT: torch.Tensor, head: int, tail: int, method: str
) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=head, tail_blocks=tail)
    adapter = AdapterConfig(method=method, num_virtual_tokens=4)  # type: ignore[arg-type]
    parts, whole = cut_model(folder, cut, adapter), part_of(folder, cut, "whole", adapter)
    logits, uncut = through(parts, ids_BT), whole(ids_BT)
    assert torch.equal(logits, uncut)
    logits.logsumexp(-1).sum().backward()
    uncut.logsumexp(-1).sum().backward()
    found = {name: p.grad for part in parts.values() for name, p in part.trainable().items()}
    reference = whole.trainable()
    tied = method == "full" and "model.lm_head.weight" not in reference
    if tied:  # two copies here; one tensor on a real client (see test_tied_weights_are_one_tensor)
        found["model.model.embed_tokens.weight"] = found["model.model.embed_tokens.weight"] + found.pop(
            "model.lm_head.weight"
        )
    assert found.keys() == reference.keys()
    for name, parameter in reference.items():
        if tied and "embed_tokens" in name:
            torch.testing.assert_close(found[name], parameter.grad)
        else:
            assert torch.equal(found[name], parameter.grad), name


def test_prefixes_equal_pefts(folder: Path, ids_BT: torch.Tensor) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    parts = cut_model(folder, cut, AdapterConfig(method="p_tuning_v2", num_virtual_tokens=6))
    peft_model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    )
    tables = [parts[kind].prefix.encoders[kind].embedding.weight for kind in KINDS]  # type: ignore[union-attr,index]
    with torch.no_grad():
        peft_model.prompt_encoder["default"].embedding.weight.copy_(torch.cat(tables, 1))
    theirs = peft_model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    torch.testing.assert_close(through(parts, ids_BT), theirs, rtol=1e-6, atol=1e-6)


def test_lora_equals_pefts(folder: Path, ids_BT: torch.Tensor) -> None:
    from peft import LoraConfig, get_peft_model

    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=2)
    parts = cut_model(folder, cut, AdapterConfig(lora_r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"]))
    peft_model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder),
        LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    ours = {name: p for part in parts.values() for name, p in part.trainable().items()}
    with torch.no_grad():
        for parameter in ours.values():  # the B factors start at 0 and would hide the A factors
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        theirs = dict(peft_model.named_parameters())
        for name, parameter in ours.items():
            theirs[f"base_model.{name}"].copy_(parameter)
    assert len(ours) == sum(p.requires_grad for p in peft_model.parameters())
    torch.testing.assert_close(through(parts, ids_BT), peft_model(input_ids=ids_BT).logits, rtol=1e-6, atol=1e-6)


def test_label_positions_give_the_same_logits(folder: Path, ids_BT: torch.Tensor) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    parts = cut_model(folder, cut)
    labels = LabelPositions(row_L=torch.tensor([0, 0, 2]), position_L=torch.tensor([3, 4, 10]))
    full_BTV = through(parts, ids_BT)
    torch.testing.assert_close(through(parts, ids_BT, labels), full_BTV[labels.row_L, labels.position_L])


def test_right_padding_never_reaches_valid_tokens(folder: Path, ids_BT: torch.Tensor) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    parts = cut_model(folder, cut)
    lengths = (11, 4, 7)
    smashed_BTD = parts["head"](ids_BT)
    again_BTD = pad(pack(smashed_BTD, lengths), lengths)
    whole, repacked = parts["trunk"](smashed_BTD), parts["trunk"](again_BTD)
    for row, length in enumerate(lengths):
        assert torch.equal(whole[row, :length], repacked[row, :length])


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (2, 1)])
def test_a_part_reads_and_holds_only_its_own(folder: Path, head: int, tail: int) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=head, tail_blocks=tail)
    keys: dict[PartKind, set[str]] = {}
    for kind in KINDS:
        source = WeightSource(FileResolver(str(folder)))
        part = build_part(AutoConfig.from_pretrained(folder), cut.part(kind), source, dtype=torch.float32)
        keys[kind] = source.keys_read
        assert source.bytes_read == sum(p.numel() * 4 for p in part.parameters())
    assert not keys["trunk"] & (keys["head"] | keys["tail"])
    assert {int(k.split(".")[2]) for k in keys["trunk"]} == set(range(head, BLOCKS - tail))
    assert "model.embed_tokens.weight" in keys["head"]
    assert "model.norm.weight" in keys["tail"]
    assert "model.norm.weight" not in keys["head"]


@pytest.mark.parametrize(("head", "tail"), [(5, 0), (4, 1), (0, 5), (9, 1)])
def test_a_cut_without_trunk_is_refused(head: int, tail: int) -> None:
    with pytest.raises(ConfigError, match=f"--model.head_blocks {head} .* 5 blocks"):
        Cut(blocks=BLOCKS, head_blocks=head, tail_blocks=tail)


def test_unknown_target_modules_list_the_valid_ones(folder: Path) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    with pytest.raises(ConfigError, match=r"query_key.*valid: down_proj, gate_proj, k_proj"):
        part_of(folder, cut, "trunk", AdapterConfig(target_modules=["query_key"]))


def test_parts_left_out_stay_frozen(folder: Path) -> None:
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    adapter = AdapterConfig(parts=["trunk"])
    parts = cut_model(folder, cut, adapter)
    assert [bool(parts[kind].trainable()) for kind in KINDS] == [False, True, False]
    whole = part_of(folder, cut, "whole", adapter)
    assert whole.trainable().keys() == parts["trunk"].trainable().keys()


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    source = WeightSource(FileResolver(str(tmp_path)))
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight"):
        build_part(AutoConfig.from_pretrained(folder), cut.part("trunk"), source, dtype=torch.float32)


def test_a_truncated_file_is_named(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole"):
        WeightSource(FileResolver(str(tmp_path)))
