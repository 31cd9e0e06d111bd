"""A model that cannot be cut is refused with the reason; code in a model's folder is never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AutoModelForCausalLM

from hpc.config import AdapterConfig, Config, ModelConfig
from hpc.errors import BadInput, ConfigError, ModelError
from hpc.model.adapters import attach_adapter
from hpc.model.anatomy import study
from hpc.model.build import ModelBuilder
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source.cut import Cut
from hpc.source.files import FileResolver
from hpc.source.resolve import block_count
from tests.families import BLOCKS, COMMON, FAMILIES, GQA, MHA, VOCABULARY, make_model

pytestmark = pytest.mark.filterwarnings("ignore")
MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
REFUSED: dict[str, tuple[Any, str]] = {
    "gemma3n": (lambda: hf.Gemma3nTextConfig(**GQA, head_dim=8, num_kv_shared_layers=0, **PER_LAYER), "token ids"),
    "gemma4": (lambda: hf.Gemma4TextConfig(**GQA, head_dim=8, num_kv_shared_layers=0, **PER_LAYER), "token ids"),
    "gemma4_shared": (
        lambda: hf.Gemma4TextConfig(**GQA, head_dim=8, num_kv_shared_layers=2, layer_types=["full_attention"] * BLOCKS),
        "share keys and values",
    ),
    "minimax": (lambda: hf.MiniMaxConfig(**GQA, **MOE), "cache is of its own kind"),
    "mamba": (lambda: hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=BLOCKS), "recurrent"),
    "rwkv": (lambda: hf.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=BLOCKS), "own kind"),
    "bart": (lambda: hf.BartConfig(vocab_size=VOCABULARY, d_model=32, encoder_layers=BLOCKS), "encoder-decoder"),
    "jamba": (
        lambda: hf.JambaConfig(**GQA, num_experts=1, attn_layer_period=2, attn_layer_offset=1),
        "layer_types follow",
    ),
    "bert": (lambda: hf.BertConfig(**MHA, is_decoder=True), "neither token ids"),
    "layerdrop": (lambda: hf.OPTConfig(**COMMON, word_embed_proj_dim=32, ffn_dim=48, layerdrop=0.1), "layerdrop"),
}


def part_of(config: Any, folder: Path, kind: Any = "trunk") -> Any:
    cut = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
    return build_part(config, cut.part(kind), WeightSource(FileResolver(str(folder))), dtype=torch.float32), cut


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_the_reason_is_given(llama: Path, name: str) -> None:
    make_config, reason = REFUSED[name]
    with pytest.raises(ModelError, match=rf"cannot be cut.*: .*{reason}"):
        part_of(make_config(), llama)


def test_an_encoder_decoder_is_no_decoder(llama: Path, tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=32, num_layers=BLOCKS)
    with pytest.raises(ModelError, match="t5 cannot be cut: it is an encoder-decoder"):
        part_of(config, llama)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder, which cannot be cut"):
        ModelBuilder.of(Config(model=ModelConfig(name_or_path=str(tmp_path))))


class Scrambled(hf.LlamaForCausalLM):
    """Computes something between two of its blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        second = self.model.layers[1]
        second.register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))


class Crossing(hf.LlamaForCausalLM):
    """Gives its blocks what it learned in front of them."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for block in self.model.layers:
            block.register_forward_pre_hook(self.add, with_kwargs=True)

    def add(self, module: Any, args: Any, kwargs: Any) -> Any:
        return args, kwargs | {"memory": self.model.embed_tokens.weight.sum(0)}


class Shapeless(hf.LlamaForCausalLM):
    """Has no list of blocks."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers = self.model.layers[:-1]


@pytest.mark.parametrize(
    ("cls", "reason"),
    [(Scrambled, "between its blocks"), (Crossing, "also receive memory"), (Shapeless, "no list of 5 blocks")],
)
def test_what_a_cut_would_change_is_seen(cls: Any, reason: str) -> None:
    with torch.device("meta"):
        model = cls(FAMILIES["llama"].config())
    with pytest.raises(ModelError, match=f"{cls.__name__} cannot be cut: .*{reason}"):
        study(model)


def test_a_part_sees_that_its_first_block_gets_what_it_is_given(llama: Path) -> None:
    part, _ = part_of(hf.AutoConfig.from_pretrained(llama), llama)
    part.check_entry()
    part.blocks[0].register_forward_pre_hook(lambda module, args: (args[0] * 2, *args[1:]))
    with pytest.raises(ModelError, match="block 1 does not get what it is given"):
        part.check_entry()


def test_code_in_a_models_folder_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "novel", "auto_map": auto_map, "num_hidden_layers": BLOCKS})
    )
    with pytest.raises(BadInput, match=r"auto_map.*never run") as refused:
        ModelBuilder.of(Config(model=ModelConfig(name_or_path=str(tmp_path))))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_are_counted_without_torch(name: str) -> None:
    assert block_count(json.loads(FAMILIES[name].config().to_json_string())) == BLOCKS


def test_blocks_of_a_text_model_inside_another_are_counted() -> None:
    assert block_count({"text_config": {"num_hidden_layers": 7}, "vision_config": {"num_hidden_layers": 3}}) == 7
    assert block_count({"num_layers": 28, "model_type": "chatglm"}) == 28
    assert block_count({"vision_config": {"num_hidden_layers": 3}}) is None


def test_unknown_targets_list_those_of_all_blocks(tmp_path: Path) -> None:
    make_model("qwen2_moe").save_pretrained(tmp_path)
    config = hf.AutoConfig.from_pretrained(tmp_path)
    part, cut = part_of(config, tmp_path, "head")  # its one block has no shared expert
    with pytest.raises(ConfigError, match=r"query.*valid: down_proj, .*shared_expert_gate"):
        attach_adapter(part, AdapterConfig(target_modules=["query"]), cut, seed=0)
    attach_adapter(part, AdapterConfig(target_modules=["shared_expert_gate"]), cut, seed=0)
    assert not part.trainable()


def test_a_prefix_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    config = hf.DeepseekV3Config(
        **GQA | {"num_key_value_heads": 4}, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8,
        v_head_dim=8, first_k_dense_replace=BLOCKS, moe_intermediate_size=8, n_routed_experts=2, num_experts_per_tok=1,
        n_group=1, topk_group=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    part, cut = part_of(config, tmp_path)
    with pytest.raises(ModelError, match="p_tuning_v2 does not fit DeepseekV3ForCausalLM"):
        attach_adapter(part, AdapterConfig(method="p_tuning_v2", num_virtual_tokens=2), cut, seed=0)


def test_a_part_without_keys_and_values_is_not_continued(tmp_path: Path) -> None:
    config = hf.Lfm2Config(**GQA, full_attn_idxs=[0])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    part, _ = part_of(config, tmp_path)
    with pytest.raises(ModelError, match=r"blocks 1 to 3 of Lfm2ForCausalLM keep no keys and values"):
        part.remember(2)
