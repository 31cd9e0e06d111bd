"""One client's prompts, checked before any trunk is asked, and the answers on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hpc.config import Config
from hpc.errors import ConfigError
from hpc.model.continued import ContinuedLM, check_prompts
from hpc.model.pretrained import load_hf_config, load_tokenizer
from hpc.source.resolve import resolve
from hpc.wishes import Wishes


def answer(model: ContinuedLM, encoded: tuple[torch.Tensor, torch.Tensor], wishes: Wishes) -> None:
    """Print each prompt of `rows_of` with its continuation; a single one without beams word by word, as it comes."""
    ids_BT, mask_BT = (each.to(model.device) for each in encoded)
    streams = len(ids_BT) == 1 and wishes.num_beams == 1
    arguments = wishes.arguments()
    if streams:
        arguments["streamer"] = TextStreamer(model.tokenizer, skip_special_tokens=True)
    if wishes.stop:
        arguments["tokenizer"] = model.tokenizer
    set_seed(wishes.seed)
    start = time.perf_counter()
    found_BT = model.generate(ids_BT, attention_mask=mask_BT, pad_token_id=pad_id(model), **arguments)
    seconds = time.perf_counter() - start
    if not streams:
        print("\n\n".join(model.tokenizer.batch_decode(found_BT, skip_special_tokens=True)))
    new = found_BT.shape[1] - ids_BT.shape[1]
    told = f"{new} tokens" if len(ids_BT) == 1 else f"{new} tokens for each of {len(ids_BT)} prompts"
    print(f"({told} in {seconds:.1f} s, {1000 * seconds / new:.0f} ms a token)", file=sys.stderr)


def rows_of(config: Config, prompts: Sequence[str], wishes: Wishes) -> tuple[torch.Tensor, torch.Tensor]:
    """`encode` with the model's tokenizer. Raises `ConfigError` for prompts that the model cannot continue."""
    resolver = resolve(config.model)
    tokenizer = load_tokenizer(resolver)
    tokenizer.padding_side = "left"
    ids_BT, mask_BT = encode(tokenizer, prompts, chat=wishes.chat)
    check_prompts(load_hf_config(resolver), ids_BT, mask_BT, wishes.max_new_tokens)
    return ids_BT, mask_BT


def encode(tokenizer: Any, prompts: Sequence[str], *, chat: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids_BT` and `mask_BT`, padded on the tokenizer's side.

    Raises `ConfigError` if `chat` is asked of a model without a chat template.
    """
    texts = list(prompts)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("--chat true: this model has no chat template; leave it out")
        said = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in said]
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None and len(texts) > 1:
            raise ConfigError("this model's tokenizer has no token to pad with; give one prompt at a time")
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=not chat, verbose=False)
    return encoded.input_ids, encoded.attention_mask


def pad_id(model: ContinuedLM) -> int:
    """What stands behind a row that has ended before the others."""
    known = (model.tokenizer.pad_token_id, model.generation_config.pad_token_id, model.tokenizer.eos_token_id)
    return next((int(each) for each in known if each is not None), 0)
