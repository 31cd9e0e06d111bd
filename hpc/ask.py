"""One client's prompts through a model, and the answers on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import torch
from transformers import TextStreamer, set_seed

from hpc.errors import ConfigError
from hpc.model.continued import ContinuedLM
from hpc.wishes import Wishes


def answer(model: ContinuedLM, prompts: Sequence[str], wishes: Wishes) -> None:
    """Print each prompt with its continuation; a single one without beams word by word, as it comes."""
    ids_BT, mask_BT = encode(model, prompts, chat=wishes.chat)
    streams = len(prompts) == 1 and wishes.num_beams == 1
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
    told = f"{new} tokens" if len(prompts) == 1 else f"{new} tokens for each of {len(prompts)} prompts"
    print(f"({told} in {seconds:.1f} s, {1000 * seconds / new:.0f} ms a token)", file=sys.stderr)


def encode(model: ContinuedLM, prompts: Sequence[str], *, chat: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`ids_BT` and `mask_BT` on the model's device, padded on the left.

    Raises `ConfigError` if `chat` is asked of a model without a chat template.
    """
    tokenizer, texts = model.tokenizer, list(prompts)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("--chat true: this model has no chat template; leave it out")
        said = [[{"role": "user", "content": text}] for text in texts]
        texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in said]
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None and len(texts) > 1:
            raise ConfigError("this model's tokenizer has no token to pad with; give one prompt at a time")
        tokenizer.pad_token = tokenizer.eos_token
    encoded = tokenizer(texts, return_tensors="pt", padding=len(texts) > 1, add_special_tokens=not chat)
    return encoded.input_ids.to(model.device), encoded.attention_mask.to(model.device)


def pad_id(model: ContinuedLM) -> int:
    """What stands behind a row that has ended before the others."""
    known = (model.tokenizer.pad_token_id, model.generation_config.pad_token_id, model.tokenizer.eos_token_id)
    return next((int(each) for each in known if each is not None), 0)
