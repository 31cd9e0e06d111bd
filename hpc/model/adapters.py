"""What learns in a part: LoRA or p-tuning v2 through PEFT, or the part's own weights.

Every trainable tensor starts from values that depend only on the seed and on its name in the uncut model, so the same
model cut anywhere, or not at all, starts from the same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hpc.config import AdapterConfig
from hpc.errors import ConfigError, ModelError
from hpc.model.anatomy import Anatomy, is_linear
from hpc.model.part import Part
from hpc.source.cut import Cut, PartKind


def attach_adapter(part: Part, adapter: AdapterConfig, cut: Cut, seed: int) -> None:
    """Make the blocks of the parts named in `adapter.parts` learn; everything else stays frozen.

    Raises `ConfigError` for target modules that the model does not have (the valid ones are listed).
    """
    if adapter.method == "p_tuning_v2":
        # In every part, prefixed or not: PEFT counts positions from the end of the prefix.
        part.position_offset = 0 if part.needs_layout else adapter.num_virtual_tokens
    learning = [b for b in range(part.spec.first, part.spec.last) if cut.kind_of_block(b) in adapter.parts]
    {"lora": _attach_lora, "p_tuning_v2": _attach_prefix, "full": _unfreeze}[adapter.method](
        part, adapter, cut, learning, seed
    )


def _attach_lora(part: Part, adapter: AdapterConfig, cut: Cut, learning: list[int], seed: int) -> None:
    targets = _lora_targets(part, adapter)
    if not _any_target(part, targets, learning):
        return
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules=targets,
        layers_to_transform=[block - part.spec.first for block in learning],
        layers_pattern=part.block_prefix.rstrip(".").rpartition(".")[2],
    )
    inject_adapter_in_model(config, part.model)
    for name, parameter in part.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    for name, parameter in part.trainable().items():
        with torch.no_grad():
            if "lora_A" in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=named_generator(seed, name))
            else:
                parameter.zero_()


def _lora_targets(part: Part, adapter: AdapterConfig) -> list[str]:
    """Valid in any block of the whole model: a part may hold only blocks without experts, or only blocks with them."""
    valid = part.anatomy.linear_names
    unknown = [t for t in adapter.target_modules or [] if t not in valid]
    if unknown:
        raise ConfigError(
            f"--adapter.target_modules names {', '.join(unknown)}, which this model does not have; "
            f"valid: {', '.join(sorted(valid))}"
        )
    return adapter.target_modules or default_targets(part.anatomy)


def _any_target(part: Part, targets: list[str], learning: list[int]) -> bool:
    blocks = [part.blocks[block - part.spec.first] for block in learning]
    return any(is_linear(m) and n.rpartition(".")[2] in targets for b in blocks for n, m in b.named_modules())


def _attach_prefix(part: Part, adapter: AdapterConfig, cut: Cut, learning: list[int], seed: int) -> None:
    if not learning:
        return
    if len(learning) != part.spec.blocks:
        raise ConfigError(f"--adapter.parts {adapter.parts}: p_tuning_v2 in an uncut model needs head, trunk and tail")
    part.prefix = Prefix(part, adapter, cut, seed)


def _unfreeze(part: Part, adapter: AdapterConfig, cut: Cut, learning: list[int], seed: int) -> None:
    """Train the weights of the parts named; kept in float32 whatever the model's dtype, as AdamW needs it."""
    dtype = next(part.parameters()).dtype
    part.autocast_dtype = dtype if dtype != torch.float32 else None
    for name, parameter in part.named_parameters():
        if part.owner(part.whole_name(name), cut) in adapter.parts:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


class Prefix(nn.Module):
    """The prefixes of one part's blocks: PEFT's own encoders, one a part, reshaped into a key-value cache.

    Each part owns the prefixes of its own blocks, so no key or value crosses a link. An uncut model holds the three
    parts' encoders side by side; without projection that equals one PEFT encoder over all blocks, column by column.
    """

    def __init__(self, part: Part, adapter: AdapterConfig, cut: Cut, seed: int) -> None:
        super().__init__()
        from peft import PrefixEncoder, PrefixTuningConfig

        self.kv_heads, self.head_dim = kv_shape(part.anatomy, type(part.model).__name__)
        self.tokens = adapter.num_virtual_tokens
        self.dtype = part.model.dtype  # of its first floating-point parameter: quantised ones are integers
        width = self.kv_heads * self.head_dim
        self.encoders = nn.ModuleDict()
        for kind, first, last in sections(part, cut):
            encoder = PrefixEncoder(
                PrefixTuningConfig(
                    task_type="CAUSAL_LM",
                    num_virtual_tokens=self.tokens,
                    token_dim=width,
                    num_layers=last - first,
                    num_attention_heads=self.kv_heads,
                    num_transformer_submodules=1,
                    prefix_projection=adapter.prefix_projection,
                    encoder_hidden_size=part.hidden_size,
                )
            )
            _start_encoder(encoder, kind, first, last, 2 * width, seed)
            self.encoders[kind] = encoder

    def forward(self, rows: int) -> Any:
        """A `DynamicCache` holding `P` keys and values for every block, the same for each of `rows` rows."""
        return self.cache([self.encode()], [rows])

    def encode(self) -> list[torch.Tensor]:
        """Keys and values of every block as `kv_2nHPK`, one tensor for each encoder."""
        encoded = []
        for encoder in self.encoders.values():
            device = next(encoder.parameters()).device
            flat_PK = encoder(torch.arange(self.tokens, device=device)).to(self.dtype)
            # PEFT's layout: for each block its keys, then its values.
            encoded.append(flat_PK.view(self.tokens, -1, self.kv_heads, self.head_dim).permute(1, 2, 0, 3))
        return encoded

    def cache(self, encoded: Sequence[Sequence[torch.Tensor]], rows: Sequence[int]) -> Any:
        """A `DynamicCache` from what `encode` gave: `encoded[g]` for `rows[g]` rows, then the next group's rows."""
        from transformers import DynamicCache

        cache, local = DynamicCache(), 0
        for kv_of_group in zip(*encoded, strict=True):
            per_block = zip(*(kv_2nHPK.unbind(0) for kv_2nHPK in kv_of_group), strict=True)
            kv_2n = [_repeat(kv, rows) for kv in per_block]
            for key_BHPK, value_BHPK in zip(kv_2n[0::2], kv_2n[1::2], strict=True):
                cache.update(key_BHPK, value_BHPK, local)
                local += 1
        return cache


def kv_shape(anatomy: Anatomy, name: str) -> tuple[int, int]:
    """KV heads and values per head. Raises `ModelError` where a prefix of keys and values does not fit the blocks."""
    shape, *others = set(anatomy.kv_shapes)
    if others or shape is None or shape[1] != shape[2]:
        raise ModelError(
            f"--adapter.method p_tuning_v2 does not fit {name}: its blocks do not all cache keys and values of one "
            "shape; use lora"
        )
    return shape[:2]


def default_targets(anatomy: Anatomy) -> list[str]:
    """Layers that get LoRA unless others are named: the linear ones of the blocks, but for routed experts."""
    return sorted(anatomy.linear_names - anatomy.routed_names)


def _repeat(groups_HPK: Sequence[torch.Tensor], rows: Sequence[int]) -> torch.Tensor:
    """Each group's tensor for each of its rows; a view where there is one group."""
    expanded = [one_HPK.expand(count, *one_HPK.shape) for one_HPK, count in zip(groups_HPK, rows, strict=True)]
    return expanded[0] if len(expanded) == 1 else torch.cat(expanded)


def sections(part: Part, cut: Cut) -> list[tuple[PartKind, int, int]]:
    """The parts of the cut whose blocks this part has, with the first of them and the one behind the last."""
    kinds: tuple[PartKind, ...] = ("head", "trunk", "tail") if part.spec.kind == "whole" else (part.spec.kind,)
    specs = [cut.part(kind) for kind in kinds]
    return [(s.kind, s.first, s.last) for s in specs if s.blocks]


def _start_encoder(encoder: nn.Module, kind: str, first: int, last: int, columns: int, seed: int) -> None:
    """Prefix tables start from N(0, 1) block by block (PyTorch's embedding default, as in p-tuning v2)."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name == "embedding.weight" and parameter.shape[1] == (last - first) * columns:
                for index, block in enumerate(range(first, last)):
                    section = parameter[:, index * columns : (index + 1) * columns]
                    section.copy_(torch.randn(section.shape, generator=named_generator(seed, f"prefix.{block}")))
                continue
            bound = 1 / math.sqrt(parameter.shape[-1])
            generator = named_generator(seed, f"prefix.{kind}.{name}")
            if name == "embedding.weight":
                parameter.normal_(generator=generator)
            else:
                parameter.uniform_(-bound, bound, generator=generator)
            parameter.requires_grad_(True)


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator whose stream depends on the seed and the name only."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
