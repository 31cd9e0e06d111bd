"""A p-tuning v2 prefix that a model's own files hold (ChatGLM's `pre_seq_len`): here it is an adapter. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpc.config import AdapterConfig
from hpc.errors import ConfigError


def published_prefix(adapter: AdapterConfig, raw_config: Mapping[str, Any]) -> int:
    """Tokens of the prefix in the model's files; 0: none.

    Raises `ConfigError` unless the adapter asked for is that prefix, in all parts: without it the model would not be
    what was published.
    """
    tokens = int(raw_config.get("pre_seq_len") or 0)
    if not tokens:
        return 0
    projects = bool(raw_config.get("prefix_projection", False))
    asked = adapter.method, adapter.num_virtual_tokens, adapter.prefix_projection, set(adapter.parts)
    if asked != ("p_tuning_v2", tokens, projects, {"head", "trunk", "tail"}):
        raise ConfigError(
            f"the model's files hold a p-tuning v2 prefix of {tokens} tokens (pre_seq_len), which is trained on from "
            f"here; give --adapter.method p_tuning_v2 --adapter.num_virtual_tokens {tokens} "
            f"--adapter.prefix_projection {str(projects).lower()}, in all parts, or take pre_seq_len out of a copy of "
            "its config.json"
        )
    return tokens
