"""A GGUF file of the Llama architecture as Hugging Face would have it: names, order of rows, configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import ModelError
from hpc.source.gguf_file import GgufFile, GgufTensor

PIECE_VALUES = 2**20

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Hugging Face's names of the special tokens → GGUF's.
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def open_llama(path: Path) -> GgufFile:
    """The file's header. Raises `ModelError` for another architecture, or one that this code would get wrong."""
    file = GgufFile(path)
    architecture = file.field("general.architecture")
    if architecture != "llama":
        raise ModelError(
            f"{path.name} is of architecture {architecture}; GGUF is read for llama only: give the model's "
            "Hugging Face folder or hub name"
        )
    scaling = file.fields.get("llama.rope.scaling.type", "none")
    foreign = [name for name in file.tensors if not _is_known(name)]
    if foreign or scaling != "none":
        raise ModelError(
            f"{path.name} holds {foreign[0] if foreign else 'rope scaling of type ' + scaling}, which a plain Llama "
            "does not have: give the model's Hugging Face folder or hub name"
        )
    return file


def _is_known(gguf_name: str) -> bool:
    stem = re.sub(r"^blk\.\d+\.", "", gguf_name)
    return stem.endswith(".weight") and stem.removesuffix(".weight") in _HF_NAMES


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if block is not None:
        return f"model.layers.{block[1]}.{_HF_NAMES[block[2]]}.weight"
    return f"{_HF_NAMES[gguf_name.removesuffix('.weight')]}.weight"


def unpermute(weight_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undo GGUF's order of the query and key rows (rotary pairs side by side) within each head."""
    rows, columns = weight_OI.shape
    return weight_OI.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def head_counts(file: GgufFile) -> tuple[int, int]:
    """Attention heads, and key-value heads."""
    heads = int(file.field("llama.attention.head_count"))
    return heads, int(file.field("llama.attention.head_count_kv", heads))


def rows_of(file: GgufFile, tensor: GgufTensor) -> Iterator[tuple[int, np.ndarray]]:
    """The tensor dequantised to float32, in Hugging Face's order of rows: (first row, some rows) after each other.

    A piece has about `PIECE_VALUES` values, so that a large embedding is never in memory twice. Raises `ModelError`
    for a quantisation that the `gguf` package cannot undo.
    """
    from gguf import dequantize

    unit = _rows_of_a_head(file, tensor)
    step = max(unit, PIECE_VALUES // tensor.shape[-1] // unit * unit)
    width = tensor.nbytes // tensor.rows
    with file.path.open("rb") as raw:
        raw.seek(tensor.start)
        for first in range(0, tensor.rows, step):
            count = min(step, tensor.rows - first)
            stored = np.fromfile(raw, dtype=np.uint8, count=count * width).reshape(count, width)
            try:
                values = dequantize(stored, tensor.kind)
            except NotImplementedError:  # the library's word for a kind that it cannot read
                raise ModelError(f"{tensor.name} in {file.path.name} is stored as {tensor.kind.name}, unread") from None
            yield first, unpermute(values, count // unit) if unit > 1 else values


def _rows_of_a_head(file: GgufFile, tensor: GgufTensor) -> int:
    """Rows that change places with each other: a head's of the query and the key, else 1."""
    heads, kv_heads = head_counts(file)
    if ".attn_q." in tensor.name:
        return tensor.rows // heads
    return tensor.rows // kv_heads if ".attn_k." in tensor.name else 1


def token_ids(file: GgufFile) -> dict[str, int]:
    """The special tokens that the file names, by Hugging Face's names of them."""
    ids = {name: file.fields.get(f"tokenizer.ggml.{gguf}_token_id") for name, gguf in SPECIAL_TOKENS.items()}
    return {name: int(value) for name, value in ids.items() if value is not None}


def write_configs(file: GgufFile, folder: Path) -> None:
    """config.json and generation_config.json."""
    from transformers import GenerationConfig, LlamaConfig

    heads, kv_heads = head_counts(file)
    hidden = int(file.field("llama.embedding_length"))
    ids: dict[str, Any] = {f"{name}_id": value for name, value in token_ids(file).items() if name != "unk_token"}
    config = LlamaConfig(
        vocab_size=file.tensors["token_embd.weight"].rows,
        hidden_size=hidden,
        intermediate_size=int(file.field("llama.feed_forward_length")),
        num_hidden_layers=int(file.field("llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=int(file.field("llama.attention.key_length", hidden // heads)),
        max_position_embeddings=int(file.field("llama.context_length")),
        rms_norm_eps=_shortest(file.field("llama.attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": float(file.field("llama.rope.freq_base", 10_000.0))},
        tie_word_embeddings="output.weight" not in file.tensors,
        **ids,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _shortest(value: float) -> float:
    """1e-05 for 9.999999747378752e-06: the file holds the float32 next to what was meant."""
    return float(str(np.float32(value)))
