"""ChatGLM-6B's configuration, as its published config.json writes it."""

from __future__ import annotations

from transformers import PretrainedConfig


class ChatGLMConfig(PretrainedConfig):
    """What shapes a ChatGLM model. Field names are the published ones; transformers' usual names reach them too.

    The defaults are those of THUDM/chatglm-6b. Source: that model's config.json, and GLM (Du et al., ACL 2022).
    """

    model_type = "chatglm"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012  # the base class declares it a ClassVar
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "layer_norm_eps": "layernorm_epsilon",
    }

    vocab_size: int = 130528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    layernorm_epsilon: float = 1e-5
    position_encoding_2d: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 3
    mask_token_id: int = 130000
    gmask_token_id: int = 130001
    bos_token_id: int = 130004
    eos_token_id: int | list[int] | None = 130005
    pre_seq_len: int | None = None
    """Prefix tokens of p-tuning v2; None: no prefix."""
    prefix_projection: bool = False
    """Whether the prefixes come from a small network over an embedding of `hidden_size`."""
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
