"""A small random ChatGLM with a small vocabulary, in the published files' form."""

from __future__ import annotations

import json
import random
from pathlib import Path

import sentencepiece
from safetensors.torch import save_file

from hpc.model.chatglm import ChatGLMConfig, ChatGLMForCausalLM
from hpc.source.tiny import random_weights

SPECIAL = ["[MASK]", "[gMASK]", "<sop>", "<eop>", "<n>"]
TEXT = "patient was given the ward note says in bed of and yes no question answer at night is a"
WORDS = TEXT.split()


def write_chatglm(path: Path) -> Path:
    """Four blocks; returns `path`."""
    draw = random.Random(0)
    letters = [chr(number) for number in range(33, 127)]
    sentences = [" ".join(draw.choices(WORDS, k=6) + draw.choices(letters, k=6)) for _ in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(path / "ice_text"), vocab_size=260, hard_vocab_limit=False,
        user_defined_symbols=SPECIAL, pad_id=3, pad_piece="<pad>", num_threads=1, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path / "ice_text.model"))
    tokenizer = {"tokenizer_class": "ChatGLMTokenizer", "num_image_tokens": 0}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config = {
        "model_type": "chatglm", "architectures": ["ChatGLMModel"], "vocab_size": pieces.vocab_size(),
        "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4, "inner_hidden_size": 96,
        "max_sequence_length": 512, "layernorm_epsilon": 1e-5, "position_encoding_2d": True, "pad_token_id": 3,
        "bos_token_id": pieces.piece_to_id("<sop>"), "eos_token_id": pieces.piece_to_id("<eop>"),
        "mask_token_id": pieces.piece_to_id("[MASK]"), "gmask_token_id": pieces.piece_to_id("[gMASK]"),
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    model = ChatGLMForCausalLM(ChatGLMConfig(**{k: v for k, v in config.items() if k not in ("model_type",)}))
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, seed=1)
    inv_freq = {name: b for name, b in model.state_dict().items() if "inv_freq" in name}
    save_file({**weights, **inv_freq}, path / "model.safetensors", metadata={"format": "pt"})
    return path
