"""A GGUF file's tokenizer as a Hugging Face one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpc.errors import ModelError
from hpc.source.gguf_file import GgufFile
from hpc.source.gguf_llama import token_ids

CONTROL_TOKEN = 3  # GGUF's token type for special tokens


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """The tokenizer's files, into `folder`. Raises `ModelError` for a kind that cannot be derived."""
    kind = (file.field("tokenizer.ggml.model"), file.fields.get("tokenizer.ggml.pre"))
    if kind == ("gpt2", "smollm"):
        tokenizer = _byte_level(file)
    elif kind[0] == "llama":
        tokenizer = _sentencepiece(file)
    else:
        raise ModelError(
            f"{file.path.name} has a tokenizer of kind {kind[0]}/{kind[1]}, which is not derived from GGUF: put the "
            "model's own config.json and tokenizer files beside the .gguf file"
        )
    tokenizer.save_pretrained(folder)
    _forget_class(folder / "tokenizer_config.json")


def _byte_level(file: GgufFile) -> Any:
    """BPE from the file's own vocabulary and merges, each digit by itself (GGUF's `smollm`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = file.field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.field("tokenizer.ggml.merges")]
    bpe = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    types = file.field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    named = {name: tokens[token_id] for name, token_id in token_ids(file).items()}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, model_max_length=int(file.field("llama.context_length")), **named
    )
    fast.chat_template = file.fields.get("tokenizer.chat_template")
    return fast


def _sentencepiece(file: GgufFile) -> Any:
    """Llama's and Llama-2's, by transformers' own conversion."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name, trust_remote_code=False)
    tokenizer.model_max_length = int(file.field("llama.context_length"))
    # transformers puts no space in front of a text that begins with one; SentencePiece, and so the model, always does.
    prefix = [normalizers.Prepend("▁")] if file.fields.get("tokenizer.ggml.add_space_prefix", True) else []
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def _forget_class(path: Path) -> None:
    """Name the tokenizer class that every transformers version knows, whatever this one calls it."""
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2) + "\n")
