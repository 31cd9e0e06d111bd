"""Build one part of any Hugging Face decoder, without copying modelling code.

The whole configuration is constructed on the meta device, the part's blocks are kept and renumbered, what the part
does not own is dropped, and only its own tensors are loaded. Why not a configuration with fewer layers: several
families compute something from `layer_idx` while constructing, and would silently build the wrong blocks.
"""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import torch
from torch import nn

from hpc.errors import ModelError
from hpc.model.anatomy import Anatomy, study
from hpc.model.conversion import ConvertedSource
from hpc.model.part import Part
from hpc.model.stand_ins import Absent, NoEmbedding, PassThrough
from hpc.model.weights import WeightSource
from hpc.source.cut import PartSpec

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "per_layer_config")
INDEX_NAMES = ("layer_idx", "layer_id")
EMBEDDING_DROPOUTS = ("dropout", "embedding_dropout")  # of stacks that call it as a function


def build_part(config: Any, spec: PartSpec, source: WeightSource, *, dtype: torch.dtype) -> Part:
    """The part `spec` of the model that `config` (a `PretrainedConfig`) describes, loaded in `dtype` on the CPU.

    Raises `ModelError` if the architecture cannot be cut (with the reason), or the source lacks a tensor.
    """
    model = skeleton(config)
    anatomy = studied(model, config)
    converted = ConvertedSource(source, model)
    ties = _cut_out(model, anatomy, spec)
    _load(model, spec, converted, anatomy.block_prefix, dtype, ties=ties)
    model.requires_grad_(False)
    part = Part(model=model, anatomy=anatomy, spec=spec, tied=bool(ties))
    part.check_entry()
    return part


def empty_part(config: Any, spec: PartSpec) -> Part:
    """The part with its tensors on the meta device: shapes without values, and nothing is read."""
    model = skeleton(config)
    anatomy = studied(model, config)
    ties = _cut_out(model, anatomy, spec)
    model.requires_grad_(False)
    return Part(model=model, anatomy=anatomy, spec=spec, tied=bool(ties))


def _cut_out(model: Any, anatomy: Anatomy, spec: PartSpec) -> dict[str, str]:
    """Leave the part's modules only. Gives the ties of the whole model: name → the tensor that it is."""
    ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
    _slice_blocks(model, anatomy, spec)
    _drop_foreign(model, anatomy, spec)
    return ties


_STUDIED: dict[str, Anatomy] = {}


def studied(model: Any, config: Any) -> Anatomy:
    """Once for each configuration: a client builds two parts of it, and the pass on the meta device takes a while."""
    key = f"{type(model).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _STUDIED:
        _STUDIED[key] = study(model)
    return _STUDIED[key]


def skeleton(config: Any) -> Any:
    """The whole model on the meta device, its non-persistent buffers (rotary tables) materialised."""
    from transformers import AutoModelForCausalLM

    if config.is_encoder_decoder:
        raise ModelError(f"{config.model_type} cannot be cut: it is an encoder-decoder")
    config = copy.deepcopy(config)
    # Routers' own loss would need all blocks; it is no part of the model's output.
    config.output_router_logits = False
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(f"{config.model_type} cannot be built as a decoder: {str(error).splitlines()[0]}") from None
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            # Rows come without a mask, and rightly so.
            module.warn_if_padding_and_no_attention_mask = _say_nothing
    persistent = set(model.state_dict(keep_vars=True))
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    tables = [name for name, _ in model.named_buffers() if name not in persistent]
    for name in tables:
        owner, _, leaf = name.rpartition(".")
        empty = torch.empty_like(model.get_buffer(name), device="cpu")
        table = empty.fill_(math.nan) if empty.is_floating_point() else empty
        model.get_submodule(owner).register_buffer(leaf, table, persistent=False)
    # Before slicing: some families compute their tables from the whole configuration.
    model.initialize_weights()
    for name in tables:
        if model.get_buffer(name).isnan().any():
            raise ModelError(f"{type(model).__name__} cannot be cut: its table {name} is not computed by itself")
    return model


def _say_nothing(*args: Any) -> None:
    pass


def _slice_blocks(model: Any, anatomy: Anatomy, spec: PartSpec) -> None:
    """Keep the part's blocks, number them from 0 (the cache reads local indices), and fit the configuration."""
    stack = model.get_submodule(anatomy.stack)
    kept = nn.ModuleList(list(getattr(stack, anatomy.blocks))[spec.first : spec.last])
    for local, block in enumerate(kept):
        for module in block.modules():
            for name in INDEX_NAMES:
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, local)
    setattr(stack, anatomy.blocks, kept)
    configs = [
        model.config,
        model.config.get_text_config(),
        *(m.config for m in stack.modules() if hasattr(m, "config")),
    ]
    for config in {id(config): config for config in configs}.values():
        config.tie_word_embeddings = False
        if not hasattr(config, "num_hidden_layers"):
            continue
        lists = {
            n: v[spec.first : spec.last] for n in PER_LAYER_LISTS if isinstance(v := getattr(config, n, None), list)
        }
        config.num_hidden_layers = spec.blocks
        for name, kept_entries in lists.items():
            _set_list(config, name, kept_entries)


def _set_list(config: Any, name: str, entries: list[Any]) -> None:
    """Some configurations compute the list from the number of blocks: right only where it comes out the same."""
    try:
        setattr(config, name, entries)
    except AttributeError:
        if getattr(config, name) != entries:
            raise ModelError(
                f"{config.model_type} cannot be cut here: its {name} follow from the number of its blocks, and a part "
                "has fewer of them"
            ) from None


def _drop_foreign(model: Any, anatomy: Anatomy, spec: PartSpec) -> None:
    """What is left of another part's module holds nothing and changes nothing."""
    before, after = set(anatomy.before), set(anatomy.after)
    holders = [n for n, m in model.named_modules() if _holds_tensors(m) and not n.startswith(anatomy.block_prefix)]
    replaced: tuple[str, ...] = ()
    for name in holders:
        if name.startswith(replaced):
            continue
        if name not in before | after:
            stand_in: nn.Module = Absent(name)
        elif not spec.owns_embedding and name in before - after:
            stand_in = _before_stand_in(model, name)
        elif not spec.owns_lm_head and name in after - before:
            stand_in = PassThrough()
        else:
            continue
        model.set_submodule(name, stand_in)
        replaced += (f"{name}.",)
    if not spec.owns_embedding:
        _silence_dropout(model, before, model.get_submodule(anatomy.stack))


def _before_stand_in(model: Any, name: str) -> nn.Module:
    module = model.get_submodule(name)
    if module is model.get_input_embeddings():
        return Absent(name)
    return NoEmbedding() if isinstance(module, nn.Embedding) else PassThrough()


def _silence_dropout(model: nn.Module, before: set[str], stack: Any) -> None:
    """What it would do to hidden states is never read here, but it would draw random numbers."""
    for name in before:
        if isinstance(model.get_submodule(name), nn.Dropout):
            model.set_submodule(name, PassThrough())
    for name in EMBEDDING_DROPOUTS:
        if isinstance(getattr(stack, name, None), float):
            setattr(stack, name, 0.0)


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _load(
    model: Any,
    spec: PartSpec,
    source: ConvertedSource,
    block_prefix: str,
    dtype: torch.dtype,
    *,
    ties: dict[str, str],
) -> None:
    """Fill the part's tensors from the source, straight in `dtype`; assert that nothing is left on meta."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
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
