"""Generation by transformers' own `generate`, over a model of which this process may hold only a part.

Greedy, sampling, beams, stopping, streaming and the processors of logits are the library's; what is given to it is a
model whose forward pass is a `Chain`. Shape suffixes: B rows, T new columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hpc.errors import ConfigError
from hpc.model.part import Part
from hpc.ragged import left_mask

CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


class Chain(Protocol):
    """All parts of a model in a row, with what they remember of one batch of rows."""

    @property
    def columns(self) -> int:
        """Columns that the rows have so far."""

    def extend(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """Continue the rows; `logits_BV` of the last column. `mask_BT`: 1 for a token, 0 for left padding."""

    def reorder(self, rows_B: torch.Tensor) -> None:
        """Row b goes on from what row `rows_B[b]` was."""

    def close(self) -> None:
        """Forget the rows."""


class WholeChain:
    """The uncut model as a chain of one."""

    def __init__(self, part: Part, rows: int) -> None:
        self._part, self._memory = part, part.remember(rows)

    @property
    def columns(self) -> int:
        return self._memory.columns

    def extend(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return self._part.extend(ids_BT, self._memory, mask_BT)

    def reorder(self, rows_B: torch.Tensor) -> None:
        self._memory.reorder(rows_B)

    def close(self) -> None:
        pass


class ChainCache(Cache):
    """What `generate` takes for its key-value cache: the chain, which holds the real ones."""

    def __init__(self, open_chain: Callable[[int], Chain]) -> None:
        super().__init__(layers=[])
        self._open = open_chain
        self.chain: Chain | None = None

    def extend(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        """`logits_BV`. The first call tells how many rows there are."""
        if self.chain is None:
            self.chain = self._open(len(ids_BT))
        return self.chain.extend(ids_BT, mask_BT)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.chain is None else self.chain.columns

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.chain is not None:
            self.chain.reorder(beam_idx)

    def close(self) -> None:
        if self.chain is not None:
            self.chain.close()


class ContinuedLM(PreTrainedModel, GenerationMixin):
    """A causal language model for `generate` only; takes what any model of transformers takes there."""

    main_input_name = "input_ids"
    tokenizer: Any
    """The model's, padding on the left."""
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # nothing is computed here

    def __init__(
        self, config: Any, open_chain: Callable[[int], Chain], *, device: torch.device, folder: str | None = None
    ) -> None:
        """`config`: the uncut model's. `open_chain` begins a chain for so many rows. `folder`: has its defaults."""
        super().__init__(config)
        self._open_chain = open_chain
        self._device = device
        if folder is not None:
            with suppress(OSError):  # a model without defaults of its own
                self.generation_config = GenerationConfig.from_pretrained(folder)
        self.generation_config.cache_implementation = None  # the cache is the chain
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where `generate` works; there is no parameter here to tell."""
        return self._device

    @torch.no_grad()
    def generate(  # type: ignore[override]  # the library's further arguments are in `kwargs`
        self, inputs: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As `GenerationMixin.generate`: token ids `_BT` in (`input_ids`, `attention_mask`), token ids out.

        Several prompts are padded on the left. Raises `ConfigError` for a prompt that leaves no room in the context,
        padding on the right, or `use_cache=False`.
        """
        ids_BT = inputs if inputs is not None else kwargs.pop("input_ids")
        mask_BT = kwargs.pop("attention_mask", None)
        mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        new = kwargs.get("max_new_tokens") or self.generation_config.max_new_tokens
        check_prompts(self.config, ids_BT, mask_BT, new)
        if not kwargs.get("use_cache", True):
            raise ConfigError("use_cache=False would send the whole text for every token; leave it on")
        # Said aloud: a model's own defaults may switch it off.
        kwargs["use_cache"] = True
        cache = ChainCache(self._open_chain)
        try:
            # Not through super(), whose annotation of `self` is a protocol that no class can name.
            return GenerationMixin.generate(
                self,  # type: ignore[arg-type]
                ids_BT,
                attention_mask=mask_BT,
                past_key_values=cache,
                **kwargs,
            )
        finally:
            cache.close()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        past_key_values: ChainCache,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """One step of `generate`. `others` (positions, how many logits) follow from the mask; none: no padding."""
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        logits_BV = past_key_values.extend(input_ids, mask_BT)
        return CausalLMOutputWithPast(logits=logits_BV[:, None], past_key_values=past_key_values)


def check_prompts(config: Any, ids_BT: torch.Tensor, mask_BT: torch.Tensor, new_tokens: int | None) -> None:
    """Raise `ConfigError` for rows that the model cannot continue by `new_tokens` (None: by one)."""
    lengths = mask_BT.sum(1).tolist()
    if min(lengths) < 1:
        raise ConfigError(f"prompt {lengths.index(min(lengths))} has no tokens; give it some text")
    if not torch.equal(left_mask(lengths).to(mask_BT), mask_BT):
        raise ConfigError("prompts are padded on the right; set tokenizer.padding_side = 'left'")
    room, longest = context_of(config), ids_BT.shape[1]
    if room is not None and longest >= room:
        raise ConfigError(
            f"the prompt has {longest} tokens; the model's context of {room} leaves no room to continue it"
        )
    if room is not None and new_tokens and longest + new_tokens - 1 > room:
        raise ConfigError(
            f"the prompt has {longest} tokens; {new_tokens} new ones exceed the model's context of {room}: ask for at "
            f"most {room - longest + 1} (max_new_tokens), or shorten the prompt"
        )


def context_of(config: Any) -> int | None:
    """Most tokens that a row can have; None where positions do not end (ALiBi) or are not told."""
    text = config.get_text_config(decoder=True)
    found = [getattr(text, key, None) for key in CONTEXT_KEYS]
    return next((int(value) for value in found if value), None)
