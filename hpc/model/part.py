"""One part of a cut model as a module: hidden states or token ids in, hidden states or logits out.

Shape suffixes: B rows, T tokens, D hidden size, L label positions (over all rows), V vocabulary, P prefix tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc.model.memory import Memory
from hpc.source.cut import Cut, PartKind, PartSpec


class Absent(nn.Module):
    """Stands for a module of another part; running it is a mistake in the split."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{self.name} belongs to another part and must not run here")


class PassThrough(nn.Module):
    """Stands for what comes after the blocks in a part that hands its hidden states on."""

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden


@dataclass(kw_only=True, frozen=True)
class LabelPositions:
    """Positions whose hidden states predict a label token; the LM head runs at these only.

    Exact: the other positions have no loss. `row_L` and `position_L` are int64 of the same length.
    """

    row_L: torch.Tensor
    position_L: torch.Tensor


class Part(nn.Module):
    """Head: `ids_BT` → `smashed_BTD`. Trunk: `smashed_BTD` → `trunk_out_BTD`. Tail: `trunk_out_BTD` → `logits_LV`.

    Received hidden states are injected at the first block (a pre-hook), so whatever a family does in front of its
    blocks cannot touch them. Rows are right-padded; causal attention keeps padding out of valid tokens, so no mask.
    """

    def __init__(
        self,
        *,
        model: Any,
        stack: nn.Module,
        blocks: nn.ModuleList,
        post: nn.Module,
        spec: PartSpec,
        block_prefix: str,
        before_blocks: frozenset[str],
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.prefix: nn.Module | None = None
        self.position_offset = 0
        self.autocast_dtype: torch.dtype | None = None
        self._block_prefix = block_prefix
        self._before_blocks = before_blocks
        # In a tuple: these modules are children of `model` already and must not be registered twice.
        self._stack = (stack,)
        self._blocks = (blocks,)
        self._received: torch.Tensor | None = None
        self._labels: LabelPositions | None = None
        if not spec.owns_embedding:
            entry = blocks[0] if len(blocks) else post
            entry.register_forward_pre_hook(self._inject, with_kwargs=True)
        if spec.owns_lm_head:
            stack.register_forward_hook(self._keep_label_positions)

    @property
    def blocks(self) -> nn.ModuleList:
        return self._blocks[0]

    @property
    def block_prefix(self) -> str:
        """Name of the block list, with a dot at the end, as in `model.layers.`."""
        return self._block_prefix

    def forward(self, inputs: torch.Tensor, labels: LabelPositions | None = None) -> torch.Tensor:
        """`inputs` is `ids_BT` (int64) where the part owns the embedding, else hidden states `_BTD`."""
        if self.autocast_dtype is None:
            return self._forward(inputs, labels)
        with torch.autocast(inputs.device.type, self.autocast_dtype):
            output = self._forward(inputs, labels)
        return output if self.spec.owns_lm_head else output.to(self.autocast_dtype)

    def _forward(self, inputs: torch.Tensor, labels: LabelPositions | None) -> torch.Tensor:
        rows, tokens = inputs.shape[:2]
        positions = torch.arange(self.position_offset, self.position_offset + tokens, device=inputs.device)
        kwargs: dict[str, Any] = {"position_ids": positions[None], "use_cache": False}
        if self.prefix is not None and self.spec.blocks:
            kwargs["past_key_values"] = self.prefix(rows)
        return self._run(inputs, labels, kwargs)

    @torch.no_grad()
    def remember(self, rows: int) -> Memory:
        """An empty memory for `rows` rows, holding the prefixes where the part has any."""
        from transformers import DynamicCache

        prefixed = self.prefix is not None and self.spec.blocks > 0
        cache = self.prefix(rows) if self.prefix is not None and prefixed else DynamicCache(config=self.model.config)
        held = cache.get_seq_length() if prefixed else 0
        return Memory(cache, rows=rows, prefix_tokens=held, position_offset=self.position_offset)

    @torch.no_grad()
    def extend(self, inputs: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        """Continue the rows of `memory` by T columns: ids or hidden states in, hidden states `_BTD` out.

        A tail gives the logits of the last column only, `logits_BV`. `mask_BT`: 1 for a token, 0 for left padding.
        """
        mask_BC, positions_BT = (t.to(inputs.device) for t in memory.extend(mask_BT))
        kwargs: dict[str, Any] = {"position_ids": positions_BT, "past_key_values": memory.cache, "use_cache": True}
        if self.spec.blocks:
            kwargs["attention_mask"] = mask_BC
        labels = None
        if self.spec.owns_lm_head:
            row_L = torch.arange(len(mask_BT), device=inputs.device)
            labels = LabelPositions(row_L=row_L, position_L=torch.full_like(row_L, mask_BT.shape[1] - 1))
        return self._run(inputs, labels, kwargs)

    def _run(self, inputs: torch.Tensor, labels: LabelPositions | None, kwargs: dict[str, Any]) -> torch.Tensor:
        kwargs["input_ids" if self.spec.owns_embedding else "inputs_embeds"] = inputs
        if not self.spec.owns_lm_head:
            self._received = None if self.spec.owns_embedding else inputs
            try:
                return self._stack[0](**kwargs).last_hidden_state
            finally:
                self._received = None
        self._received, self._labels = None if self.spec.owns_embedding else inputs, labels
        try:
            logits = self.model(**kwargs).logits
        finally:
            self._received = self._labels = None
        return logits[0] if labels is not None else logits

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _keep_label_positions(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._labels is not None:
            hidden_BTD = output.last_hidden_state
            output.last_hidden_state = hidden_BTD[self._labels.row_L, self._labels.position_L][None]
        return output

    def whole_name(self, name: str) -> str:
        """A parameter's name in the uncut model (block numbers shifted back): equal in every split."""
        pattern = rf"((?:^|\.){re.escape(self._block_prefix)})(\d+)\."
        return re.sub(pattern, lambda m: f"{m[1]}{int(m[2]) + self.spec.first}.", name, count=1)

    def owner(self, whole_name: str, cut: Cut) -> PartKind:
        """The part of a cut model that owns the parameter `whole_name` (of `whole_name()`)."""
        block = re.search(rf"(?:^|\.){re.escape(self._block_prefix)}(\d+)\.", whole_name)
        if block is not None:
            return cut.kind_of_block(int(block[1]))
        for kind in ("head", "trunk", "tail"):
            if whole_name.startswith(f"prefix.encoders.{kind}."):
                return kind
        module = whole_name.removeprefix("model.").rpartition(".")[0]
        return "head" if module in self._before_blocks else "tail"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their name in the uncut model, in a fixed order."""
        return {self.whole_name(n): p for n, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what learns from a checkpoint's `parameter/<name in the uncut model>` entries."""
        for name, parameter in self.trainable().items():
            parameter.copy_(state[f"parameter/{name}"])
