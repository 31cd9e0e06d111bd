"""Where a decoder can be cut, found by watching its uncut skeleton read two tokens on the meta device.

Names and registration order mislead (OPT registers its output projection in front of the blocks), so the order of
execution tells. What cannot be cut without changing its results is refused here, with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc.errors import ModelError


@dataclass(kw_only=True, frozen=True)
class Anatomy:
    """Module names are those of the uncut model."""

    stack: str
    """The module that owns the block list and runs it."""
    blocks: str
    """The block list's name in the stack."""
    before: frozenset[str]
    """Modules that run before the first block."""
    after: tuple[str, ...]
    """Modules that run after the last block, in order."""
    first_after: str | None
    """The first module of the stack that gets the last block's output; none if the stack ends with its blocks."""
    kv_shapes: tuple[tuple[int, int, int] | None, ...]
    """Each block's KV heads and the widths of a key and of a value, as cached; none where it caches neither."""
    linear_names: frozenset[str]
    """Last parts of the names of the linear layers in the blocks."""
    routed_names: frozenset[str]
    """Those of them that some block has in its routed experts, which see tokens picked from all rows."""

    @property
    def block_prefix(self) -> str:
        """The block list's whole name with a dot at the end, as in `model.layers.`."""
        return f"{self.stack}.{self.blocks}." if self.stack else f"{self.blocks}."


def study(model: Any) -> Anatomy:
    """The anatomy of a whole model whose parameters are on the meta device.

    Raises `ModelError` with the reason if it cannot be cut.
    """
    text = model.config.get_text_config()
    _refuse_by_configuration(model, text)
    lists = _block_lists(model, text.num_hidden_layers)
    watch = _Watch(model, lists)
    with watch, _all_on_meta(model), _experts_by_shape(model):
        cache = _read_two_tokens(model, text)
    name = watch.executed_list()
    blocks = lists[name]
    watch.require_plain_chain(blocks)
    stack_name, _, list_name = name.rpartition(".")
    _refuse_by_signature(model.get_submodule(stack_name))
    before, after = watch.around(blocks)
    inside = f"{stack_name}." if stack_name else ""
    linear = [(n, n.rpartition(".")[2]) for n, m in blocks.named_modules() if is_linear(m)]
    return Anatomy(
        stack=stack_name,
        blocks=list_name,
        before=frozenset(before),
        after=tuple(after),
        first_after=after[0] if after and after[0].startswith(inside) else None,
        kv_shapes=_kv_shapes(cache, len(blocks)),
        linear_names=frozenset(leaf for _, leaf in linear),
        routed_names=frozenset(leaf for n, leaf in linear if ".experts." in n),
    )


def is_linear(module: nn.Module) -> bool:
    """transformers' Conv1D (gpt2) is a linear layer with its weight transposed; PEFT handles both."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _refuse_by_configuration(model: Any, text: Any) -> None:
    reasons = {
        "its blocks share keys and values with earlier blocks": getattr(text, "num_kv_shared_layers", 0),
        "every block reads the token ids through an embedding of its own": getattr(
            text, "hidden_size_per_layer_input", 0
        ),
        "it leaves out whole blocks at random while training; set layerdrop to 0 in its config.json": getattr(
            text, "layerdrop", 0
        ),
        "its cache is of its own kind": not model._supports_default_dynamic_cache(),
    }
    for reason, applies in reasons.items():
        if applies:
            raise _uncuttable(model, reason)


def _refuse_by_signature(stack: nn.Module) -> None:
    takes = inspect.signature(stack.forward).parameters
    if "past_key_values" not in takes:
        raise _uncuttable(stack, "it keeps a recurrent state, not keys and values")
    if "inputs_embeds" not in takes:
        raise _uncuttable(stack, "it runs the blocks, but takes neither token ids nor their embeddings")


def _uncuttable(model: nn.Module, reason: str) -> ModelError:
    return ModelError(f"{type(model).__name__} cannot be cut: {reason}")


def _block_lists(model: nn.Module, count: int) -> dict[str, nn.ModuleList]:
    """Candidates, outermost first. An image tower may have as many blocks; which list reads text is seen later."""
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count}
    if not lists:
        raise _uncuttable(model, f"it has no list of {count} blocks")
    return lists


@contextmanager
def _all_on_meta(model: nn.Module) -> Iterator[None]:
    """Tables that were computed already take part in a pass on the meta device, and come back after it."""
    real = {name: buffer for name, buffer in model.named_buffers() if buffer.device.type != "meta"}
    try:
        _set_buffers(model, {name: buffer.to("meta") for name, buffer in real.items()})
        yield
    finally:
        _set_buffers(model, real)


@contextmanager
def _experts_by_shape(model: Any) -> Iterator[None]:
    """The default way to run experts asks for bfloat16 on the meta device; this one only for shapes."""
    if not model._can_set_experts_implementation():
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    yield
    model.set_experts_implementation(before)


def _set_buffers(root: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._buffers[leaf] = buffer


def _read_two_tokens(model: Any, text: Any) -> Any:
    """Gives the cache. With an empty cache transformers asks no question whose answer would need real numbers."""
    from transformers import DynamicCache

    cache = DynamicCache(config=text)
    ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        model(input_ids=ids_BT, past_key_values=cache, use_cache=False)
    except Exception as error:  # modelling code of any family
        raise _uncuttable(model, f"its code failed on two tokens ({type(error).__name__}: {error})") from None
    return cache


def _kv_shapes(cache: Any, blocks: int) -> tuple[tuple[int, int, int] | None, ...]:
    return tuple(_kv_shape(cache.layers[b]) if b < len(cache.layers) else None for b in range(blocks))


def _kv_shape(layer: Any) -> tuple[int, int, int] | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None or keys.dim() != 4:
        return None
    return int(keys.shape[1]), int(keys.shape[3]), int(values.shape[3])


def _is_leaf(module: nn.Module) -> bool:
    """Also of a module with children, if it has parameters beside theirs (the LM head's bias of bert)."""
    return not any(True for _ in module.children()) or any(True for _ in module.parameters(recurse=False))


class _Watch:
    """Hooks that note which modules run, and what the candidates' blocks receive and give."""

    def __init__(self, model: nn.Module, lists: dict[str, nn.ModuleList]) -> None:
        self._model, self._lists = model, lists
        self._blocks = {id(block) for blocks in lists.values() for block in blocks}
        self._events: list[tuple[str, nn.Module]] = []
        self._received: dict[int, Any] = {}
        self._given: dict[int, torch.Tensor] = {}
        self._extras: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            if id(module) in self._blocks:
                self._hooks.append(module.register_forward_pre_hook(self._block_starts, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._block_ends))
            if id(module) in self._blocks or _is_leaf(module):
                self._hooks.append(module.register_forward_pre_hook(self._runs(name)))

    def __exit__(self, *args: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _runs(self, name: str) -> Any:
        return lambda module, args: self._events.append((name, module))

    def _block_starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._received[id(module)] = args[0] if args else kwargs.get("hidden_states")
        extras = {**{str(i): value for i, value in enumerate(args[1:], 1)}, **kwargs}
        extras.pop("hidden_states", None)
        # Learned from the embedding, then: a trunk could not know it.
        self._extras += [n for n, v in extras.items() if isinstance(v, torch.Tensor) and v.requires_grad]

    def _block_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._given[id(module)] = output[0] if isinstance(output, tuple) else output

    def executed_list(self) -> str:
        """The outermost candidate whose blocks all ran."""
        for name, blocks in self._lists.items():
            if all(id(block) in self._given for block in blocks):
                return name
        raise _uncuttable(self._model, f"of {', '.join(self._lists)} none runs from the first block to the last")

    def require_plain_chain(self, blocks: nn.ModuleList) -> None:
        """Each block gets exactly what the one before it gave, and nothing else that was learned."""
        if self._extras:
            raise _uncuttable(self._model, f"its blocks also receive {self._extras[0]}, computed in front of them")
        for before, after in zip(blocks, list(blocks)[1:], strict=False):
            if self._received[id(after)] is not self._given[id(before)]:
                raise _uncuttable(self._model, "something is computed between its blocks")
        hidden = self._received[id(blocks[0])]
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3:
            raise _uncuttable(self._model, "its blocks do not pass on one hidden state for each token")

    def around(self, blocks: nn.ModuleList) -> tuple[list[str], list[str]]:
        """Names of the leaf modules that run before the first block, and after the last one."""
        inside = {id(m) for m in blocks.modules()}
        names = [("", True) if id(module) in inside else (name, False) for name, module in self._events]
        where = [index for index, (_, is_inside) in enumerate(names) if is_inside]
        before = [name for name, is_inside in names[: where[0]] if not is_inside]
        return before, [name for name, _ in names[where[-1] + 1 :]]
