"""ChatGLM-6B as written here equals the published code: values recorded from that code are the other side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hpc.errors import ModelError
from hpc.model.chatglm import ChatGLMConfig, ChatGLMForCausalLM
from hpc.model.chatglm.layout import row_layout_of
from hpc.model.chatglm.prefix import prefix_of_blocks
from hpc.model.chatglm.rotary import frequencies, rotation_of
from hpc.model.pretrained import load_hf_config
from hpc.source.files import FileResolver

GOLDEN = Path(__file__).resolve().parents[2] / ".." / "shared" / "golden" / "chatglm"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="needs shared/golden/chatglm beside the repository")

# float32: what another order of summation may change in logits of up to 2.4, and in gradients of up to 0.2.
LOGIT, GRADIENT = 2e-6, 2e-7


def load(variant: str, **kwargs: Any) -> ChatGLMForCausalLM:
    model: ChatGLMForCausalLM = ChatGLMForCausalLM.from_pretrained(GOLDEN / variant, **kwargs)
    return model


def expected(variant: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / variant / "expected.safetensors")


def greedy(model: ChatGLMForCausalLM, ids_BT: torch.Tensor, **kwargs: Any) -> list[list[int]]:
    rows: list[list[int]] = model.generate(ids_BT, max_new_tokens=8, do_sample=False, **kwargs).tolist()
    return rows


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("variant", ["base", "prefix"])
def test_golden_logits_loss_gradients_and_greedy_text(variant: str, attention: str) -> None:
    golden, model = expected(variant), load(variant, attn_implementation=attention)
    output = model(input_ids=golden["input_ids"], labels=golden["labels"])
    torch.testing.assert_close(output.logits, golden["logits"], rtol=0, atol=LOGIT)
    torch.testing.assert_close(output.loss[None], golden["loss"], rtol=0, atol=LOGIT)
    output.loss.backward()
    gradients = {f"grad.{name}": p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(gradients) == {key for key in golden if key.startswith("grad.")}
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, golden[key], rtol=0, atol=GRADIENT)
    assert greedy(model, golden["greedy_input"]) == golden["greedy_output"].tolist()
    assert greedy(model, golden["greedy_input"], use_cache=False) == golden["greedy_output"].tolist()


def test_keys_are_the_published_ones() -> None:
    config = ChatGLMConfig.from_pretrained(GOLDEN / "chatglm-6b.config.json")
    assert (config.num_hidden_layers, config.intermediate_size, config.max_position_embeddings) == (28, 16384, 2048)
    with torch.device("meta"):
        model = ChatGLMForCausalLM(config)
    index = json.loads((GOLDEN / "chatglm-6b.index.json").read_text())
    assert set(model.state_dict()) == set(index["weight_map"])


@pytest.mark.parametrize("trust", [False, None])
def test_auto_classes_take_ours_and_ask_nothing(trust: bool | None, tmp_path: Path) -> None:
    published = json.loads((GOLDEN / "chatglm-6b.config.json").read_text())
    tiny = json.loads((GOLDEN / "base" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**published, **tiny, "torch_dtype": "float32"}))
    (tmp_path / "model.safetensors").symlink_to((GOLDEN / "base" / "model.safetensors").resolve())
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)
    assert type(model) is ChatGLMForCausalLM
    assert type(AutoModelForCausalLM.from_config(load_hf_config(FileResolver(str(tmp_path))))) is ChatGLMForCausalLM
    golden = expected("base")
    torch.testing.assert_close(model(golden["input_ids"]).logits, golden["logits"], rtol=0, atol=LOGIT)


@pytest.mark.parametrize("variant", ["base", "prefix"])
def test_saved_and_loaded_again_it_is_the_same(variant: str, tmp_path: Path) -> None:
    model = load(variant)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    again = ChatGLMForCausalLM.from_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(GOLDEN / variant / "model.safetensors").keys()
    ids_BT = expected(variant)["input_ids"]
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    learning = {name for name, p in again.named_parameters() if p.requires_grad}
    if variant == "prefix":
        assert learning == {"lm_head.weight", "transformer.prefix_encoder.embedding.weight"}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", ["base", "prefix"])
def test_right_padded_rows_equal_single_ones(variant: str, masked: bool) -> None:
    model, ids_BT = load(variant), expected(variant)["input_ids"]
    lengths = [12, 9, 16]
    mask_BT = torch.arange(ids_BT.shape[1]) < torch.tensor(lengths)[:, None]
    padded_BT = ids_BT.where(mask_BT, 3)
    together_BTV = model(padded_BT, attention_mask=mask_BT.long() if masked else None).logits
    for row, length in enumerate(lengths):
        alone_1TV = model(ids_BT[row : row + 1, :length]).logits
        torch.testing.assert_close(together_BTV[row, :length], alone_1TV[0], rtol=0, atol=LOGIT)


@pytest.mark.parametrize("variant", ["base", "prefix"])
def test_left_padded_rows_go_on_like_single_ones(variant: str) -> None:
    model = load(variant)
    prompts = [row[: row.index(196) + 1] for row in expected(variant)["input_ids"].tolist()]
    padded_BT, mask_BT = left_padded(prompts)
    together = greedy(model, padded_BT, attention_mask=mask_BT)
    for prompt, row in zip(prompts, together, strict=True):
        assert row[padded_BT.shape[1] :] == greedy(model, torch.tensor([prompt]))[0][len(prompt) :]


@pytest.mark.parametrize("variant", ["base", "prefix"])
def test_beams_with_a_cache_equal_beams_without(variant: str) -> None:
    model = load(variant)
    padded_BT, mask_BT = left_padded([[51, 134, 72, 199, 196, 105], [19, 121, 198, 196]])
    cached, plain = (
        greedy(model, padded_BT, attention_mask=mask_BT, num_beams=3, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert cached == plain


def left_padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    rows = [[3] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor(mask)


class Piece:
    """Blocks `first` to `last` of one instance; the rest of that instance is unused, as in a cut model."""

    def __init__(self, first: int, last: int) -> None:
        self.model = load("base")
        self.stack = self.model.transformer
        self.stack.layers = self.stack.layers[first:last]
        for local, block in enumerate(self.stack.layers):
            block.attention.layer_idx = local
        if last < 4:
            self.stack.final_layernorm = torch.nn.Identity()
        self.cache = DynamicCache()

    def run(self, hidden_BTD: torch.Tensor, layout_B2: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = self.stack(inputs_embeds=hidden_BTD, row_layout_B2=layout_B2, **kwargs)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def test_blocks_without_ids_equal_the_whole_model() -> None:
    golden, first, second = expected("base"), Piece(0, 1), Piece(1, 4)
    ids_BT = golden["input_ids"]
    layout_B2 = torch.tensor([[7, 8], [4, 5], [10, 11]])  # of the rows above, counted by hand
    hidden_BTD = first.run(first.stack.word_embeddings(ids_BT), layout_B2)
    logits_BTV = second.model.lm_head(second.run(hidden_BTD, layout_B2))
    assert torch.equal(logits_BTV, load("base")(ids_BT).logits)


def test_blocks_without_ids_go_on_from_their_caches() -> None:
    golden, first, second = expected("base"), Piece(0, 1), Piece(1, 4)
    whole, layout_B2 = golden["greedy_output"], torch.tensor([[7, 8], [2, 3]])
    short = [30, 169, 199, 196]
    ids_BT, mask_BC = left_padded([golden["greedy_input"][0].tolist(), short])
    places_BT = (mask_BC.cumsum(1) - 1).clamp(min=0)
    for _ in range(8):
        told: dict[str, Any] = {"attention_mask": mask_BC, "position_ids": places_BT[:, -ids_BT.shape[1] :]}
        hidden_BTD = first.run(first.stack.word_embeddings(ids_BT), layout_B2, past_key_values=first.cache, **told)
        hidden_BTD = second.run(hidden_BTD, layout_B2, past_key_values=second.cache, **told)
        ids_BT = second.model.lm_head(hidden_BTD[:, -1:]).argmax(-1)
        short.append(int(ids_BT[1]))
        assert int(ids_BT[0]) == int(whole[0, mask_BC.shape[1]])
        mask_BC = torch.cat([mask_BC, torch.ones(2, 1, dtype=torch.int64)], 1)
        places_BT = places_BT[:, -1:] + 1
    assert [short] == greedy(load("base"), torch.tensor([short[:4]]))


def test_layout_counts_places_and_prefers_gmask() -> None:
    config = AutoConfig.from_pretrained(GOLDEN / "base")
    ids_BT = torch.tensor([[3, 3, 50, 199, 60, 196, 61], [198, 50, 199, 196, 7, 199, 9]])
    place_BT = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])
    assert row_layout_of(ids_BT, place_BT, config).tolist() == [[1, 3], [2, 3]]


@pytest.mark.parametrize("row", [[50, 199, 60], [50, 60, 196], [50, 196, 199]])
def test_row_without_mask_and_sop_is_refused(row: list[int]) -> None:
    with pytest.raises(
        ModelError, match=r"row 1 has no \[MASK\] \(198\) or \[gMASK\] \(199\) followed by <sop> \(196\)"
    ):
        load("base")(torch.tensor([[50, 199, 196], row]))


def test_arguments_from_which_positions_do_not_follow_are_refused() -> None:
    stack = load("base").transformer
    hidden_BTD, layout_B2 = torch.zeros(1, 3, 48), torch.tensor([[1, 2]])
    with pytest.raises(ModelError, match="inputs_embeds need row_layout_B2"):
        stack(inputs_embeds=hidden_BTD)
    cache = stack(inputs_embeds=hidden_BTD, row_layout_B2=layout_B2, use_cache=True).past_key_values
    with pytest.raises(ModelError, match="position_ids"):
        stack(inputs_embeds=hidden_BTD[:, :1], row_layout_B2=layout_B2, past_key_values=cache)
    with pytest.raises(ModelError, match="position_ids has 3 dimensions"):
        stack(torch.tensor([[50, 199, 196]]), position_ids=torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(ModelError, match="either input_ids or inputs_embeds"):
        stack()
    with pytest.raises(ModelError, match="position_encoding_2d"):
        ChatGLMForCausalLM(ChatGLMConfig(**{**stack.config.to_dict(), "position_encoding_2d": False}))


def test_angles_do_not_follow_the_precision_of_the_weights() -> None:
    position_B2T = torch.full((1, 2, 1), 1999)
    for exact, low in zip(
        rotation_of(position_B2T, 128, torch.float64), rotation_of(position_B2T, 128, torch.bfloat16), strict=True
    ):
        torch.testing.assert_close(low.double(), exact, rtol=0, atol=2**-8)


def test_activation_checkpointing_changes_nothing() -> None:
    golden, model = expected("base"), load("base")
    model.activation_checkpointing_enable()
    model.train()
    model(input_ids=golden["input_ids"], labels=golden["labels"], use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad.{name}"], rtol=0, atol=GRADIENT)


def test_activation_checkpointing_with_prefixes_is_refused() -> None:
    model = load("prefix").train()
    model.activation_checkpointing_enable()
    with pytest.raises(ModelError, match="would drop the prefixes"):
        model(torch.tensor([[50, 199, 196]]))


def with_projection() -> ChatGLMForCausalLM:
    torch.manual_seed(0)
    model = ChatGLMForCausalLM(AutoConfig.from_pretrained(GOLDEN / "prefix", prefix_projection=True)).eval()
    model.load_state_dict(load_file(GOLDEN / "base" / "model.safetensors"), strict=False)
    for parameter in model.transformer.prefix_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_projected_prefix_equals_its_values_in_a_table() -> None:
    projected, ids_BT = with_projection(), expected("prefix")["input_ids"]
    state = projected.state_dict()
    published = {k.removeprefix("transformer.prefix_encoder."): v for k, v in state.items() if "prefix_encoder" in k}
    shapes = {name: tuple(tensor.shape) for name, tensor in published.items()}
    assert shapes == {
        "embedding.weight": (5, 48), "trans.0.weight": (48, 48), "trans.0.bias": (48,),
        "trans.2.weight": (384, 48), "trans.2.bias": (384,),
    }  # fmt: skip
    inner_PD = functional.linear(published["embedding.weight"], published["trans.0.weight"], published["trans.0.bias"])
    table = functional.linear(inner_PD.tanh(), published["trans.2.weight"], published["trans.2.bias"])
    plain = ChatGLMForCausalLM(AutoConfig.from_pretrained(GOLDEN / "prefix")).eval()
    base = {k: v for k, v in state.items() if "prefix_encoder" not in k}
    plain.load_state_dict({**base, "transformer.prefix_encoder.embedding.weight": table})
    assert torch.equal(projected(ids_BT).logits, plain(ids_BT).logits)
    assert not torch.equal(projected.train()(ids_BT).logits, plain(ids_BT).logits)  # dropout, in training only


def test_peft_takes_over_a_published_prefix() -> None:
    from peft import PrefixTuningConfig, get_peft_model

    golden, published = expected("prefix"), load_file(GOLDEN / "prefix" / "model.safetensors")
    model = get_peft_model(
        load("prefix", pre_seq_len=None), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ).eval()
    model.prompt_encoder["default"].load_state_dict(prefix_of_blocks(published, first=0, last=4, hidden_size=48))
    ids_BT = golden["input_ids"]
    logits_BTV = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    torch.testing.assert_close(logits_BTV, golden["logits"], rtol=0, atol=LOGIT)
    continued = model.generate(input_ids=golden["greedy_input"], max_new_tokens=8, do_sample=False)
    assert torch.equal(continued, golden["greedy_output"])


@pytest.mark.parametrize("projection", [False, True])
def test_share_of_a_published_prefix_is_peft_s_own(projection: bool) -> None:
    from peft import PrefixEncoder, PrefixTuningConfig

    model = with_projection() if projection else load("prefix")
    peft = PrefixEncoder(
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=48, num_layers=2, num_attention_heads=4,
            num_transformer_submodules=1, prefix_projection=projection, encoder_hidden_size=48,
        )
    )  # fmt: skip
    peft.load_state_dict(prefix_of_blocks(model.state_dict(), first=1, last=3, hidden_size=48))
    cache = DynamicCache()
    model(torch.tensor([[50, 199, 196]]), past_key_values=cache, use_cache=True)
    kv_P4HK = peft(torch.arange(5)).view(5, 4, 4, 12)
    for block in (1, 2):
        for index, states_1HSK in enumerate((cache.layers[block].keys, cache.layers[block].values)):
            expected_HPK = kv_P4HK[:, 2 * (block - 1) + index].transpose(0, 1)
            torch.testing.assert_close(states_1HSK[0, :, :5], expected_HPK, rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_row_of_padding_alone_stays_finite(attention: str) -> None:
    ids_BT, mask_BT = torch.tensor([[50, 199, 196], [50, 199, 196]]), torch.tensor([[1, 1, 1], [0, 0, 0]])
    assert load("base", attn_implementation=attention)(ids_BT, attention_mask=mask_BT).logits.isfinite().all()


def test_frequencies_are_the_stored_ones() -> None:
    stored = load_file(GOLDEN / "base" / "model.safetensors")["transformer.layers.3.attention.rotary_emb.inv_freq"]
    assert torch.equal(frequencies(12), stored)
    # A file without them (they are no parameters) gets them as well.
    fresh = ChatGLMForCausalLM(AutoConfig.from_pretrained(GOLDEN / "base"))
    assert torch.equal(fresh.transformer.layers[0].attention.rotary_emb.inv_freq, stored)


def test_new_prefix_on_a_published_base_starts_standard_normal_and_alone_learns() -> None:
    torch.manual_seed(0)
    model = load("base", pre_seq_len=5)
    table = model.transformer.prefix_encoder.embedding.weight
    assert table.shape == (5, 384)
    assert abs(table.std().item() - 1) < 0.05
    assert {n for n, p in model.transformer.named_parameters() if p.requires_grad} == {
        "prefix_encoder.embedding.weight"
    }


def test_logits_of_the_last_tokens_only() -> None:
    golden = expected("base")
    logits_BTV = load("base")(golden["input_ids"], logits_to_keep=2).logits
    torch.testing.assert_close(logits_BTV, golden["logits"][:, -2:], rtol=0, atol=LOGIT)
