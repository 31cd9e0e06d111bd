"""A checkpoint's tensors under the names that transformers' modules have today.

Files name and lay out some tensors otherwise than the modules do: without the base model's prefix, or one tensor for
each expert where the module holds them in one. transformers keeps the rules; here they are applied to the tensors that
one part asks for, so that nothing else is read.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch

from hpc.model.weights import WeightSource


class ConvertedSource:
    """Reads by the names in the uncut model's `state_dict`."""

    def __init__(self, source: WeightSource, model: Any) -> None:
        """`model`: the uncut skeleton."""
        self._source, self._model = source, model
        self._file_key: dict[str, str] = {}
        self._merge_of: dict[str, _Merge] = {}
        self._match_keys(model.state_dict())

    def _match_keys(self, wanted: dict[str, torch.Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        rules = get_model_conversion_mapping(self._model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix = self._model.base_model_prefix
        # Natural order: a converter takes the experts in the order of their numbers.
        for key in sorted(self._source.keys, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = key, None
            if pattern is None:
                self._file_key[name] = key
                continue
            merge = self._merge_of.setdefault(name, _Merge(by_pattern[pattern], name))
            merge.keys[pattern].append(key)
            for other in merge.names():
                self._merge_of[other] = merge

    def read(self, names: list[str], *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The named tensors in `dtype`. Raises `ModelError` naming what is missing."""
        merges = {id(m): m for name in names if (m := self._merge_of.get(name)) is not None}
        plain = {name: self._file_key.get(name, name) for name in names if name not in self._merge_of}
        tensors = self._source.read(sorted(set(plain.values())), dtype=dtype)
        found = {name: tensors[key] for name, key in plain.items()}
        for merge in merges.values():
            found |= merge.read(self._source, self._model, dtype)
        return {name: found[name] for name in names}


class _Merge:
    """Tensors of the files that a rule turns into one tensor of the model, or into several."""

    def __init__(self, rule: Any, name: str) -> None:
        self._rule, self._name = rule, name
        self.keys: dict[str, list[str]] = defaultdict(list)

    def names(self) -> list[str]:
        first, *others = self._rule.target_patterns
        return [self._name, *(self._name.replace(first, other) for other in others)]

    def read(self, source: WeightSource, model: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        rule = copy.deepcopy(self._rule)
        tensors = source.read([key for keys in self.keys.values() for key in keys], dtype=dtype)
        for pattern, keys in self.keys.items():
            for key in keys:
                rule.add_tensor(self._name, key, pattern, _now(tensors[key]))
        converted = rule.convert(self._name, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _now(tensor: torch.Tensor) -> Any:
    return lambda: tensor
