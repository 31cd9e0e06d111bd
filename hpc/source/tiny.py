"""`tiny-llama`: a small random Llama with a byte-level tokenizer, for tests. The same seed gives the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpc.source.cache import cached_folder

if TYPE_CHECKING:
    import torch

# Above transformers' usual 0.02, so that this small a model's logits are far from uniform.
WEIGHT_STD = 0.05
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
VOCABULARY = 256 + len(SPECIAL_TOKENS)


def tiny_llama_folder(*, seed: int) -> Path:
    """The model's folder (config, float32 weights, tokenizer), written on the first call."""
    return cached_folder(f"tiny-llama-seed{seed}-1", lambda folder: _write(folder, seed))


def _write(folder: Path, seed: int) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    pad, bos, eos = (256 + index for index in range(3))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=False,
        pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LlamaForCausalLM(config).named_parameters()}
    save_file(random_weights(shapes, seed), folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def random_weights(shapes: dict[str, torch.Size], seed: int) -> dict[str, torch.Tensor]:
    """Normal weights and unit norms, drawn in the order of their names, whatever the class's own initialisation."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * WEIGHT_STD
        for name, shape in sorted(shapes.items())
    }


def _write_tokenizer(folder: Path) -> None:
    """One token for each byte, no merges; ids 0-255 follow the sorted byte alphabet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytewise = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    pad, bos, eos = SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=bytewise, pad_token=pad, bos_token=bos, eos_token=eos, model_max_length=2048
    ).save_pretrained(folder)
