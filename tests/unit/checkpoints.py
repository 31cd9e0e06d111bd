"""One small Llama, written in every format that a role reads, and read back by part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hpc.config import ModelConfig
from hpc.errors import ModelError
from hpc.model.pretrained import load_hf_config
from hpc.model.split import build_part
from hpc.model.weights import WeightSource
from hpc.source.cut import Cut, PartKind
from hpc.source.resolve import resolve

BLOCKS, HEADS, KV_HEADS, VOCABULARY = 5, 4, 2, 320
SHARDS = 8
CUT = Cut(blocks=BLOCKS, head_blocks=1, tail_blocks=1)
_GGUF_NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GGUF_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def small_llama(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=512,
        initializer_range=0.05, tie_word_embeddings=tied, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_safetensors(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder)


def write_sharded_safetensors(model: LlamaForCausalLM, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="200KB")


def write_bin(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def write_sharded_bin(model: LlamaForCausalLM, folder: Path) -> None:
    model.config.save_pretrained(folder)
    weight_map = {}
    keys = list(model.state_dict())
    for number in range(SHARDS):
        name = f"pytorch_model-{number + 1:05}-of-{SHARDS:05}.bin"
        own = keys[number * len(keys) // SHARDS : (number + 1) * len(keys) // SHARDS]
        torch.save({key: model.state_dict()[key] for key in own}, folder / name)
        weight_map |= dict.fromkeys(own, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_gguf(
    model: LlamaForCausalLM,
    path: Path,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """As llama.cpp's converter does: its names, and the rotary pairs of query and key side by side."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    (add_tokenizer or add_byte_level)(writer)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = permuted(key, tensor.numpy())
        stored = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(key), gguf.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(key: str) -> str:
    stem = key.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{_GGUF_OUTSIDE[stem]}.weight"
    block, _, rest = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{_GGUF_NAMES[rest]}.weight"


def permuted(key: str, values: np.ndarray) -> np.ndarray:
    heads = HEADS if "q_proj" in key else KV_HEADS if "k_proj" in key else 0
    if not heads:
        return values
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def add_byte_level(writer: gguf.GGUFWriter) -> None:
    """Byte-level, one merge, three control tokens, as SmolLM2's."""
    from tokenizers import pre_tokenizers

    special = ["<|unk|>", "<|bos|>", "<|eos|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab"]
    tokens += [f"<unused{n}>" for n in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)


FORMATS: dict[str, Callable[[LlamaForCausalLM, Path], None]] = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded_safetensors,
    "bin": write_bin,
    "sharded bin": write_sharded_bin,
    "gguf": lambda model, folder: write_gguf(model, folder / "small.gguf"),
}


def source_of(path: Path) -> WeightSource:
    return WeightSource(resolve(ModelConfig(name_or_path=str(path))))


def read_part(path: Path, kind: PartKind, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], WeightSource]:
    """The part's tensors by their key in the whole model, and the source that they were read from."""
    resolver = resolve(ModelConfig(name_or_path=str(path)))
    source = WeightSource(resolver)
    part = build_part(load_hf_config(resolver), CUT.part(kind), source, dtype=dtype)
    return {part.whole_name(name).removeprefix("model."): p for name, p in part.named_parameters()}, source


def refused(path: Path, *parts: str) -> None:
    """Reading the head of the model at `path` is refused with a message that has each of `parts`."""
    with pytest.raises(ModelError) as caught:
        read_part(path, "head", torch.float32)
    for text in parts:
        assert text in str(caught.value)
