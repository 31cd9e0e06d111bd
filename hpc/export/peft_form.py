"""An adapter in PEFT's terms: its configuration, and prefix tuning's single table.

Shape suffixes: P prefix tokens, K keys and values of blocks, as in `hpc.export.portable`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hpc.export.layout import Layout
from hpc.export.portable import PARTS

TABLE = "prompt_embeddings"  # PEFT's key


def has_peft_form(layout: Layout) -> bool:
    """`full` has none, and neither have prefixes of some blocks only: PEFT's prefix is in front of all of them."""
    return layout.adapter.method == "lora" or (layout.adapter.method == "p_tuning_v2" and layout.covers_all_blocks)


def peft_config(layout: Layout, base_model: str) -> Any:
    """The `PeftConfig` whose model has exactly the tensors of this adapter."""
    common = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "inference_mode": True}
    return (_lora_config if layout.adapter.method == "lora" else _prefix_config)(layout, common)


def _lora_config(layout: Layout, common: Mapping[str, Any]) -> Any:
    from peft import LoraConfig

    adapter, blocks = layout.adapter, layout.blocks(PARTS)
    layers = layout.lora_layers(blocks)
    targets = sorted({name.rpartition(".")[2] for name in layers})
    same_names = {name for name, _ in layout.skeleton.named_modules() if name.rpartition(".")[2] in targets}
    only_some: dict[str, Any] = {}
    if same_names != layers.keys():  # in blocks that do not learn, or outside of the blocks
        only_some = {"layers_to_transform": sorted(blocks), "layers_pattern": _block_list(next(iter(layers)))}
    return LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        **only_some,
        **common,
    )


def _block_list(layer: str) -> str:
    """`layers` in `model.layers.3.mlp.up_proj`."""
    names = layer.split(".")
    return names[next(place for place, name in enumerate(names) if name.isdigit()) - 1]


def _prefix_config(layout: Layout, common: Mapping[str, Any]) -> Any:
    from peft import PrefixTuningConfig

    heads, head_dim = layout.kv_shape  # of keys and values, as PEFT counts them for grouped queries
    return PrefixTuningConfig(
        num_virtual_tokens=layout.adapter.num_virtual_tokens,
        num_layers=layout.cut.blocks,
        token_dim=heads * head_dim,
        num_attention_heads=heads,
        num_transformer_submodules=1,
        encoder_hidden_size=heads * head_dim,
        prefix_projection=False,  # it is evaluated already
        **common,
    )


def join_tables(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The parts' tables side by side: `table_PK` of all blocks."""
    return torch.cat([values[f"prefix.{kind}"] for kind in PARTS if f"prefix.{kind}" in values], dim=1)


def split_table(values: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """The inverse of `join_tables`; a table of another size stays as it is, for `misfit` to refuse."""
    shapes, table_PK = layout.shapes(PARTS), values[TABLE]
    widths = [columns for _, columns in shapes.values()]
    if table_PK.ndim != 2 or sum(widths) != table_PK.shape[1]:
        return dict(values)
    return dict(zip(shapes, table_PK.split(widths, dim=1), strict=True))
