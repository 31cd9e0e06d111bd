"""Build one part of any Hugging Face decoder, without copying modelling code.

The whole configuration is constructed on the meta device, the part's blocks are kept and renumbered, what the part
does not own is dropped, and only its own tensors are loaded. Why not a configuration with fewer layers: several
families compute something from `layer_idx` while constructing, and would silently build the wrong blocks.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn

from hpc.errors import ModelError
from hpc.model.part import Absent, Part, PassThrough
from hpc.model.weights import WeightSource
from hpc.source.cut import PartSpec

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "per_layer_config")
INDEX_NAMES = ("layer_idx", "layer_id")


def build_part(config: Any, spec: PartSpec, source: WeightSource, *, dtype: torch.dtype) -> Part:
    """The part `spec` of the model that `config` (a `PretrainedConfig`) describes, loaded in `dtype` on the CPU.

    Raises `ModelError` if the architecture has no block list, or the source lacks a tensor.
    """
    model = _skeleton(config)
    stack_name, list_name = _find_blocks(model, config.num_hidden_layers)
    stack = model.get_submodule(stack_name)
    order = _execution_order(model, stack, getattr(stack, list_name))
    prefix = f"{stack_name}.{list_name}."
    _slice_blocks(model, stack, list_name, spec)
    _drop_foreign(model, spec, order)
    _load(model, spec, source, prefix, dtype, tied=bool(config.tie_word_embeddings))
    model.requires_grad_(False)
    return Part(
        model=model,
        stack=stack,
        blocks=getattr(stack, list_name),
        post=order.first_post,
        spec=spec,
        block_prefix=prefix,
        before_blocks=frozenset(order.pre),
    )


class _Order:
    """Which modules outside the block list run before the blocks and which after, as observed."""

    def __init__(self, pre: list[str], post: list[str], first_post: nn.Module) -> None:
        self.pre, self.post, self.first_post = pre, post, first_post


def _skeleton(config: Any) -> Any:
    """The whole model on the meta device, its non-persistent buffers (rotary tables) materialised."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    persistent = set(model.state_dict(keep_vars=True))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    for name, buffer in list(model.named_buffers()):
        if name not in persistent:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            module.register_buffer(leaf, torch.empty_like(buffer, device="cpu"), persistent=False)
    # Before slicing: some families compute their tables from the whole configuration.
    model.initialize_weights()
    return model


def _find_blocks(model: nn.Module, count: int) -> tuple[str, str]:
    """Names of the module that owns the block list, and of the list in it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            stack_name, _, list_name = name.rpartition(".")
            return stack_name, list_name
    raise ModelError(f"{type(model).__name__} has no list of {count} blocks, so it cannot be cut")


def _execution_order(model: Any, stack: nn.Module, blocks: nn.ModuleList) -> _Order:
    """Run two tokens on the meta device and watch: registration order and names mislead (OPT, lfm2)."""
    from transformers import DynamicCache

    inside = {id(m) for m in blocks.modules()}
    events: list[tuple[str, nn.Module]] = []
    watched = [(n, m) for n, m in model.named_modules() if id(m) not in inside and _holds_tensors(m)]
    hooks = [m.register_forward_pre_hook(lambda mod, args, n=n: events.append((n, mod))) for n, m in watched]
    hooks.append(blocks[0].register_forward_pre_hook(lambda mod, args: events.append(("<blocks>", mod))))
    buffers = {name: buffer for name, buffer in stack.named_buffers() if buffer.device.type != "meta"}
    try:
        with torch.no_grad():
            _swap_buffers(stack, {name: buffer.to("meta") for name, buffer in buffers.items()})
            ids_BT = torch.zeros(1, 2, dtype=torch.long, device="meta")
            # With an empty cache transformers asks no question whose answer would need real numbers.
            model(input_ids=ids_BT, past_key_values=DynamicCache(), use_cache=False)
    finally:
        _swap_buffers(stack, buffers)
        for hook in hooks:
            hook.remove()
    names = [name for name, _ in events]
    split = names.index("<blocks>")
    pre, post = names[:split], names[split + 1 :]
    return _Order(pre=pre, post=post, first_post=events[split + 1][1])


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _swap_buffers(root: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        root.get_submodule(owner)._buffers[leaf] = buffer


def _slice_blocks(model: Any, stack: Any, list_name: str, spec: PartSpec) -> None:
    """Keep the part's blocks, number them from 0 (the cache reads local indices), and fit the configuration."""
    kept = nn.ModuleList(list(getattr(stack, list_name))[spec.first : spec.last])
    for local, block in enumerate(kept):
        for module in block.modules():
            for name in INDEX_NAMES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, local)
    setattr(stack, list_name, kept)
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config.num_hidden_layers = spec.blocks
        config.tie_word_embeddings = False
        for name in PER_LAYER_LISTS:
            if isinstance(getattr(config, name, None), list):
                setattr(config, name, getattr(config, name)[spec.first : spec.last])


def _drop_foreign(model: nn.Module, spec: PartSpec, order: _Order) -> None:
    pre, post = set(order.pre), set(order.post)
    if not spec.owns_embedding:
        for name in pre - post:
            model.set_submodule(name, Absent(name))
    if not spec.owns_lm_head:
        for name in post - pre:
            model.set_submodule(name, PassThrough())


def _load(
    model: Any, spec: PartSpec, source: WeightSource, block_prefix: str, dtype: torch.dtype, *, tied: bool
) -> None:
    """Fill the part's tensors from the source, straight in `dtype`; assert that nothing is left on meta."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    ties: dict[str, str] = dict(model._tied_weights_keys or {}) if tied else {}
    key_of = {name: ties.get(name, _whole_key(name, block_prefix, spec.first)) for name in shapes}
    tensors = source.read(sorted(set(key_of.values())), dtype=dtype)
    for name, key in key_of.items():
        if tensors[key].shape != shapes[name]:
            raise ModelError(
                f"{key} has shape {tuple(tensors[key].shape)} in the file; the configuration says {tuple(shapes[name])}"
            )
    _check_kinds(model, {name: tensors[key] for name, key in key_of.items()})
    model.load_state_dict({name: tensors[key] for name, key in key_of.items()}, assign=True)
    for name, target in ties.items():
        if name in shapes and target in shapes:
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, model.get_parameter(target))
    left = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type == "meta"]
    if left:
        raise ModelError(f"{left[0]} was not loaded: the model's files do not cover this architecture")


def _check_kinds(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    for name, wanted in model.state_dict().items():
        if tensors[name].is_floating_point() != wanted.is_floating_point():
            raise ModelError(
                f"{name} is stored as {tensors[name].dtype}, where the architecture has {wanted.dtype}: quantised "
                "weights are not read; give a checkpoint in float16, bfloat16 or float32"
            )


def _whole_key(name: str, block_prefix: str, first: int) -> str:
    """`model.layers.0.x` of a part that begins at block 5 is `model.layers.5.x` of the whole model."""
    match = re.match(re.escape(block_prefix) + r"(\d+)\.", name)
    if match is None:
        return name
    return f"{block_prefix}{int(match[1]) + first}.{name[match.end() :]}"
