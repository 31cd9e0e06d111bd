"""One part of a cut model as a module: hidden states or token ids in, hidden states or logits out.

Shape suffixes: B rows, T tokens, D hidden size, L label positions (over all rows), V vocabulary, P prefix tokens.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc.errors import ModelError
from hpc.model.anatomy import Anatomy
from hpc.model.memory import Memory
from hpc.source.cut import Cut, PartKind, PartSpec


@dataclass(kw_only=True, frozen=True)
class LabelPositions:
    """Positions whose hidden states predict a label token; the LM head runs at these only.

    Exact: the other positions have no loss. `row_L` and `position_L` are int64 of the same length.
    """

    row_L: torch.Tensor
    position_L: torch.Tensor


class Part(nn.Module):
    """Head: `ids_BT` → `smashed_BTD`. Trunk: `smashed_BTD` → `trunk_out_BTD`. Tail: `trunk_out_BTD` → `logits_LV`.

    Received hidden states are injected at the first block, and those to hand on are taken at the last one (or at what
    comes after the blocks, in a part without any), so whatever a family does around its blocks cannot touch them.
    Rows are right-padded; causal attention keeps padding out of valid tokens, so no mask.
    """

    def __init__(self, *, model: Any, anatomy: Anatomy, spec: PartSpec, tied: bool) -> None:
        """`tied`: embedding and LM head are one tensor in the uncut model."""
        super().__init__()
        self.tied = tied
        self.model = model
        self.spec = spec
        self.anatomy = anatomy
        self.prefix: nn.Module | None = None
        self.position_offset = 0
        self.autocast_dtype: torch.dtype | None = None
        # In a tuple: the stack is a child of `model` already and must not be registered twice.
        self._stack = (model.get_submodule(anatomy.stack),)
        takes = inspect.signature(self._stack[0].forward).parameters
        self._takes_positions = "position_ids" in takes
        self.needs_layout = "row_layout_B2" in takes
        """Positions depend on token ids, so whoever has only hidden states must be told each row's layout."""
        self._received: torch.Tensor | None = None
        self._tapped: torch.Tensor | None = None
        self._labels: LabelPositions | None = None
        if not spec.owns_embedding and self._entry is not None:
            # Before any hook of DeepSpeed's, so that its hooks see what the block gets.
            self._entry.register_forward_pre_hook(self._inject, with_kwargs=True)
        if spec.owns_lm_head:
            self._stack[0].register_forward_hook(self._finish_stack)

    @property
    def blocks(self) -> nn.ModuleList:
        blocks: nn.ModuleList = getattr(self._stack[0], self.anatomy.blocks)
        return blocks

    @property
    def block_prefix(self) -> str:
        """Name of the block list, with a dot at the end, as in `model.layers.`."""
        return self.anatomy.block_prefix

    @property
    def hidden_size(self) -> int:
        """D: values of one token's hidden state between two blocks."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int, int] | None, ...]:
        """KV heads and widths of a key and of a value of each of the part's blocks, as cached."""
        return self.anatomy.kv_shapes[self.spec.first : self.spec.last]

    @property
    def kv_bytes(self) -> int:
        """Of one token's keys and values in all blocks of the part."""
        values = sum(heads * (key + value) for heads, key, value in filter(None, self.kv_shapes))
        return values * next((p.dtype.itemsize for p in self.parameters() if p.is_floating_point()), 4)

    @property
    def _entry(self) -> nn.Module | None:
        """The first module that reads the hidden states; none where the stack ends with its (absent) blocks."""
        if len(self.blocks):
            return self.blocks[0]
        name = self.anatomy.first_after
        return None if name is None else self.model.get_submodule(name)

    def forward(
        self, inputs: torch.Tensor, labels: LabelPositions | None = None, layout_B2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`inputs` is `ids_BT` (int64) where the part owns the embedding, else hidden states `_BTD`.

        `layout_B2`: what `layout_of` gave for the rows; not needed beside ids.
        """
        rows, tokens = inputs.shape[:2]
        positions = torch.arange(self.position_offset, self.position_offset + tokens, device=inputs.device)
        kwargs: dict[str, Any] = {"position_ids": positions[None], "use_cache": False}
        if self.prefix is not None and self.spec.blocks:
            kwargs["past_key_values"] = self.prefix(rows)
        return self._run(inputs, labels, kwargs, layout_B2)

    def layout_of(self, ids_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor | None:
        """What the other parts must be told of these rows, `layout_B2`; None where positions follow from lengths."""
        return self._stack[0].row_layout(ids_BT, mask_BT) if self.needs_layout else None

    @torch.no_grad()
    def remember(self, rows: int, layout_B2: torch.Tensor | None = None) -> Memory:
        """An empty memory for `rows` rows, holding the prefixes where the part has any.

        Raises `ModelError` for a part that has blocks, but none that remembers keys and values.
        """
        from transformers import DynamicCache

        if self.spec.blocks and not any(self.kv_shapes):
            raise ModelError(
                f"blocks {self.spec.first} to {self.spec.last - 1} of {type(self.model).__name__} keep no keys and "
                "values, so rows cannot be continued; change --model.head_blocks or --model.tail_blocks"
            )
        prefixed = self.prefix is not None and self.spec.blocks > 0
        cache = self.prefix(rows) if self.prefix is not None and prefixed else DynamicCache(config=self.model.config)
        held = cache.get_seq_length() if prefixed else 0
        memory = Memory(cache, rows=rows, prefix_tokens=held, position_offset=self.position_offset)
        memory.layout_B2 = layout_B2
        return memory

    @torch.no_grad()
    def extend(self, inputs: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        """Continue the rows of `memory` by T columns: ids or hidden states in, hidden states `_BTD` out.

        A tail gives the logits of the last column only, `logits_BV`. `mask_BT`: 1 for a token, 0 for left padding.
        """
        if self.spec.owns_embedding and memory.layout_B2 is None:
            memory.layout_B2 = self.layout_of(inputs, mask_BT)  # of the prompt; it holds for what follows
        mask_BC, positions_BT = (t.to(inputs.device) for t in memory.extend(mask_BT))
        kwargs: dict[str, Any] = {"position_ids": positions_BT, "past_key_values": memory.cache, "use_cache": True}
        if self.spec.blocks:
            kwargs["attention_mask"] = mask_BC
        labels = None
        if self.spec.owns_lm_head:
            row_L = torch.arange(len(mask_BT), device=inputs.device)
            labels = LabelPositions(row_L=row_L, position_L=torch.full_like(row_L, mask_BT.shape[1] - 1))
        return self._run(inputs, labels, kwargs, memory.layout_B2)

    def _run(
        self,
        inputs: torch.Tensor,
        labels: LabelPositions | None,
        kwargs: dict[str, Any],
        layout_B2: torch.Tensor | None,
    ) -> torch.Tensor:
        if self.needs_layout and layout_B2 is None and not self.spec.owns_embedding:
            layout_B2 = torch.zeros(len(inputs), 2, dtype=torch.int64)  # a row that stands for nobody
        if layout_B2 is not None:
            kwargs["row_layout_B2"] = layout_B2.to(inputs.device)
        if self.autocast_dtype is None:
            return self._call(inputs, labels, kwargs)
        with torch.autocast(inputs.device.type, self.autocast_dtype):
            output = self._call(inputs, labels, kwargs)
        return output if self.spec.owns_lm_head else output.to(self.autocast_dtype)

    def _call(self, inputs: torch.Tensor, labels: LabelPositions | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """The one place where the model's own code is called."""
        if self.spec.owns_embedding:
            kwargs["input_ids"] = inputs
        else:  # only a shape: what blocks get is injected, and some families (ctrl) scale their input in place
            kwargs["inputs_embeds"] = torch.zeros_like(inputs)
        if not self._takes_positions:
            del kwargs["position_ids"]
        self._received, self._labels = None if self.spec.owns_embedding else inputs, labels
        try:
            if self.spec.owns_lm_head:
                logits: torch.Tensor = self.model(**kwargs).logits
                return logits[0] if labels is not None else logits
            return self._hidden(kwargs)
        finally:
            self._received = self._labels = None

    def _hidden(self, kwargs: dict[str, Any]) -> torch.Tensor:
        """What the last block gives. Not through the LM class, whose scales and caps are the tail's."""
        with self._tapping():
            hidden_BTD: torch.Tensor = self._stack[0](**kwargs).last_hidden_state
        tapped_BTD, self._tapped = self._tapped, None
        return hidden_BTD if tapped_BTD is None else tapped_BTD

    @contextmanager
    def _tapping(self) -> Iterator[None]:
        """Hooked anew for each pass: after the hooks of DeepSpeed, whose outputs belong to its own bookkeeping."""
        if len(self.blocks):
            hook = self.blocks[-1].register_forward_hook(self._tap_output)
        elif self._entry is not None:
            hook = self._entry.register_forward_pre_hook(self._tap_input, with_kwargs=True)
        else:
            hook = None
        try:
            yield
        finally:
            if hook is not None:
                hook.remove()

    def _tap_output(self, module: nn.Module, args: Any, output: Any) -> None:
        self._tapped = output[0] if isinstance(output, tuple) else output

    def _tap_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tapped = args[0] if args else kwargs["hidden_states"]

    def _inject(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (self._received, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._received}

    def _finish_stack(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Inject where nothing of the stack was left to inject at, and keep the label positions."""
        hidden_BTD = output.last_hidden_state
        if self._received is not None and self._entry is None:
            hidden_BTD = self._received
        if self._labels is not None:
            hidden_BTD = hidden_BTD[self._labels.row_L, self._labels.position_L][None]
        output.last_hidden_state = hidden_BTD
        return output

    @torch.no_grad()
    def check_entry(self) -> None:
        """Run the model's code up to the first block and see that it gets exactly what the part was given.

        Raises `ModelError` otherwise. The blocks themselves do not run, so this takes no time.
        """
        entry = self._entry
        if self.spec.owns_embedding or entry is None:
            return
        parameter = next(entry.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        sent_BTD = torch.linspace(-1, 1, 2 * self.hidden_size, dtype=dtype).view(1, 2, -1)
        hook = entry.register_forward_pre_hook(_stop_at, with_kwargs=True)
        try:
            self(sent_BTD.clone())
        except _Reached as reached:
            if torch.equal(reached.hidden_BTD, sent_BTD):
                return
        finally:
            hook.remove()
        raise ModelError(
            f"{type(self.model).__name__} cannot be cut: block {self.spec.first} does not get what it is given"
        )

    def whole_name(self, name: str) -> str:
        """A parameter's name in the uncut model (block numbers shifted back): equal in every split."""
        pattern = rf"((?:^|\.){re.escape(self.block_prefix)})(\d+)\."
        return re.sub(pattern, lambda m: f"{m[1]}{int(m[2]) + self.spec.first}.", name, count=1)

    def owner(self, whole_name: str, cut: Cut) -> PartKind:
        """The part of a cut model that owns the parameter `whole_name` (of `whole_name()`)."""
        block = re.search(rf"(?:^|\.){re.escape(self.block_prefix)}(\d+)\.", whole_name)
        if block is not None:
            return cut.kind_of_block(int(block[1]))
        for kind in ("head", "trunk", "tail"):
            if whole_name.startswith(f"prefix.encoders.{kind}."):
                return kind
        module = whole_name.removeprefix("model.").rpartition(".")[0]
        return "head" if module in self.anatomy.before else "tail"

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their name in the uncut model, in a fixed order."""
        return {self.whole_name(n): p for n, p in self.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def load_trainable(self, state: Mapping[str, torch.Tensor]) -> None:
        """Set what learns from a checkpoint's `parameter/<name in the uncut model>` entries."""
        for name, parameter in self.trainable().items():
            parameter.copy_(state[f"parameter/{name}"])


class _Reached(Exception):
    """The first block was reached, with these hidden states."""

    def __init__(self, hidden_BTD: torch.Tensor) -> None:
        super().__init__()
        self.hidden_BTD = hidden_BTD


def _stop_at(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(args[0] if args else kwargs["hidden_states"])
