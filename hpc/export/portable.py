"""What learned, under the names and in the form that plain PEFT and transformers have for it.

`lora`: PEFT's keys. `full`: the whole model's keys. `p_tuning_v2`: one table a part, `prefix.<part>`; side by side they
are PEFT's single table over all blocks. A projection is evaluated, so its MLP need not travel.

Shape suffixes: P prefix tokens, H a projection's hidden width, K keys and values of a part's blocks in PEFT's order
(block by block, first the keys, then the values).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch.nn import functional as F

from hpc.source.cut import PartKind

PARTS: tuple[PartKind, ...] = ("head", "trunk", "tail")
_ENCODERS = "prefix.encoders."


def portable(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float32 copies on the CPU of `values`, which have the names of `Part.trainable()`."""
    others = ((name, value) for name, value in values.items() if not name.startswith(_ENCODERS))
    return dict(renamed(others)) | _tables(values)


def renamed(values: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """`portable` one by one, for `lora` and `full`: so a large trunk is never held whole."""
    for name, value in values:
        yield portable_name(name), value.detach().to("cpu", torch.float32, copy=True).contiguous()


def portable_name(name: str) -> str:
    """The portable name of what `Part.trainable()` calls `name`: the part's own `model.` is dropped, or made PEFT's."""
    if name.startswith(_ENCODERS):
        return f"prefix.{name.removeprefix(_ENCODERS).split('.')[0]}"
    if ".lora_A." in name or ".lora_B." in name:
        return f"base_model.{name.replace('.default.', '.')}"
    return name.removeprefix("model.")


def _tables(values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tables = {}
    for kind in PARTS:
        start = f"{_ENCODERS}{kind}."
        own = {n.removeprefix(start): v.detach().float() for n, v in values.items() if n.startswith(start)}
        if own:
            tables[f"prefix.{kind}"] = encode_table(own).to("cpu", copy=True).contiguous()
    return tables


def encode_table(encoder: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`table_PK` of one of PEFT's prefix encoders, from its tensors by name; with a projection, what its MLP gives."""
    table = encoder["embedding.weight"]
    if "transform.0.weight" not in encoder:
        return table
    hidden_PH = torch.tanh(F.linear(table, encoder["transform.0.weight"], encoder["transform.0.bias"]))
    return F.linear(hidden_PH, encoder["transform.2.weight"], encoder["transform.2.bias"])
