"""ChatGLM-6B (the first generation, THUDM/chatglm-6b) as a transformers model, with the published tensor names.

Source: GLM (Du et al., ACL 2022) and the published checkpoint's layout. `hpc.model.chatglm.layout` says what the
positions and the attention depend on. Shape suffixes: B rows, T tokens of this call, C columns of a mask, S key slots
(cached, then T), D hidden size, V vocabulary, H heads, P prefix tokens, K head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hpc.errors import ModelError
from hpc.model.chatglm.block import ChatGLMBlock
from hpc.model.chatglm.configuration import ChatGLMConfig
from hpc.model.chatglm.layout import allowed_of, places_of, positions_of, row_layout_of
from hpc.model.chatglm.prefix import DROPOUT, PrefixEncoder, PrefixTable
from hpc.model.chatglm.rotary import RotaryFrequencies, frequencies, rotation_of


class ChatGLMPreTrainedModel(PreTrainedModel):
    """Initialisation and what transformers may do with the models below."""

    config: ChatGLMConfig
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012  # the base class's own types
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RotaryFrequencies):
            initialization.copy_(module.inv_freq, frequencies(module.head_size))
        elif isinstance(module, PrefixTable):
            initialization.normal_(module.weight)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which forgets while loading what is frozen."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for module in model.modules():
            if isinstance(module, ChatGLMModel):
                module.freeze_for_prefix()
        return loaded


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Embedding, blocks and final norm: ids or embeddings in, hidden states `_BTD` out.

    Raises `ModelError` for a configuration without 2-D positions.
    """

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        if not config.position_encoding_2d:
            raise ModelError("position_encoding_2d is false: only ChatGLM's published 2-D positions are implemented")
        self.head_size = config.hidden_size // config.num_attention_heads
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config)
            self.dropout = nn.Dropout(DROPOUT)
        self.freeze_for_prefix()
        self.post_init()

    def freeze_for_prefix(self) -> None:
        """With prefixes only they learn in here, as published (an LM head learns unless it is frozen by hand)."""
        if self.config.pre_seq_len is not None:
            self.requires_grad_(False)
            self.prefix_encoder.requires_grad_(True)

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.word_embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        row_layout_B2: torch.Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Run T tokens of B rows.

        `input_ids` `_BT`, or `inputs_embeds` `_BTD` with `row_layout_B2` (a part without token ids). `attention_mask`
        `_BC`: 0 at padding. `position_ids` `_BT` or `_1T`: each token's **place** (see `layout`); by default the rows
        begin here. `row_layout_B2`: int64, see `layout`; by default read from the ids, which must then hold whole
        rows. Raises `ModelError` for ids or arguments from which the layout or the places do not follow.
        """
        hidden_BTD = self._embed(input_ids, inputs_embeds)
        rows, tokens = hidden_BTD.shape[:2]
        held = 0 if past_key_values is None else past_key_values.get_seq_length()
        _refuse_unclear(position_ids, attention_mask, goes_on=row_layout_B2 is not None and held > 0)
        place_BT = places_of(rows, tokens, attention_mask, hidden_BTD.device) if position_ids is None else position_ids
        layout_B2 = self._layout(input_ids, place_BT, row_layout_B2).to(hidden_BTD.device)
        cache = self._prefixed(past_key_values, rows, held, use_cache, hidden_BTD.dtype)
        held = 0 if cache is None else cache.get_seq_length()
        rotation = rotation_of(positions_of(layout_B2, place_BT), self.head_size, hidden_BTD.dtype)
        allowed_B1TS = allowed_of(layout_B2, place_BT, held=held, attention_mask_BC=attention_mask)
        for block in self.layers:
            hidden_BTD = block(hidden_BTD, rotation=rotation, allowed_B1TS=allowed_B1TS, past_key_values=cache)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden_BTD),
            past_key_values=cache if self._caches(use_cache) else None,
        )

    def row_layout(self, ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """`row_layout_B2` of whole rows, for parts of a cut model that have no ids. Raises as `row_layout_of` does."""
        rows, tokens = ids_BT.shape
        place_BT = places_of(rows, tokens, attention_mask_BT, ids_BT.device)
        return row_layout_of(ids_BT, place_BT, self.config)

    def _embed(self, ids_BT: torch.Tensor | None, embedded_BTD: torch.Tensor | None) -> torch.Tensor:
        if (ids_BT is None) == (embedded_BTD is None):
            raise ModelError("ChatGLM takes either input_ids or inputs_embeds")
        embedded: torch.Tensor = self.word_embeddings(ids_BT) if embedded_BTD is None else embedded_BTD
        return embedded

    def _layout(
        self, ids_BT: torch.Tensor | None, place_BT: torch.Tensor, row_layout_B2: torch.Tensor | None
    ) -> torch.Tensor:
        if row_layout_B2 is not None:
            return row_layout_B2
        if ids_BT is None:
            raise ModelError("inputs_embeds need row_layout_B2: mask token's place and context length of each row")
        return row_layout_of(ids_BT, place_BT, self.config)

    def _caches(self, use_cache: bool | None) -> bool:
        return bool(self.config.use_cache if use_cache is None else use_cache)

    def _prefixed(self, cache: Any, rows: int, held: int, use_cache: bool | None, dtype: torch.dtype) -> Any:
        """The cache to use; an empty one is begun with the prefixes of this model's blocks."""
        prefixed = self.config.pre_seq_len is not None
        if cache is None and (prefixed or self._caches(use_cache)):
            cache = DynamicCache()
        if prefixed and not held:
            if self.training and any(block.gradient_checkpointing for block in self.layers):
                raise ModelError("activation checkpointing would drop the prefixes (pre_seq_len): turn one of them off")
            kv_2NHPK = self.prefix_encoder(self.head_size).to(dtype)
            kv_2NBHPK = self.dropout(kv_2NHPK[:, None].expand(-1, rows, -1, -1, -1))
            for index, block in enumerate(self._block_numbers()):
                cache.update(kv_2NBHPK[2 * block], kv_2NBHPK[2 * block + 1], index)
        return cache

    def _block_numbers(self) -> list[int]:
        """The blocks held here, by their number in the whole model."""
        return [block.number for block in self.layers if isinstance(block, ChatGLMBlock)]


def _refuse_unclear(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, *, goes_on: bool) -> None:
    for name, tensor in (("position_ids", position_ids), ("attention_mask", attention_mask)):
        if tensor is not None and tensor.ndim != 2:
            raise ModelError(
                f"{name} has {tensor.ndim} dimensions, not 2: ChatGLM here takes each token's place in its row and a "
                "mask of padding, not the published code's positions and masks, which it derives itself"
            )
    if goes_on and position_ids is None:
        raise ModelError("rows that go on from a cache need position_ids: the places of the new tokens")


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """ChatGLM with its LM head: `logits_BTV`, loss and `generate`."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        row_layout_B2: torch.Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As `ChatGLMModel.forward`. `labels` `_BT`: -100 where there is no loss; shifted here. Loss in nats/token.

        `logits_to_keep`: only the last so many tokens get logits; 0: all.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            row_layout_B2=row_layout_B2,
        )
        logits_BTV = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=output.past_key_values)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, *args: Any, row_layout_B2: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """`input_ids` holds the rows from their beginning, so the layout is read here, whatever is fed this time."""
        if row_layout_B2 is None:
            place_BT = kwargs.get("position_ids")
            if place_BT is None:
                rows, tokens = input_ids.shape
                place_BT = places_of(rows, tokens, kwargs.get("attention_mask"), input_ids.device)
            row_layout_B2 = row_layout_of(input_ids, place_BT, self.config)
        prepared = GenerationMixin.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)  # type: ignore[arg-type]
        return {**prepared, "row_layout_B2": row_layout_B2}
