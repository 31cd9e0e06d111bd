"""Many clients' trainable values over one frozen base: every row of a batch is computed with its own client's values.

Split federated training (Thapa et al., 2022) keeps one trunk for each client. M trunks, held as what they differ in,
cost one base and M adapters, and all clients' rows pass through the base together.

Shape suffixes: K clients of this rank, N values that one client trains, B rows, T tokens, D hidden size, G entries of a
batched product (groups of rows, or single rows), M positions of one entry, I and O a layer's inputs and outputs,
R LoRA's rank, P prefix tokens, X the shape of one trainable tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hpc.errors import ModelError
from hpc.model.adapters import Prefix
from hpc.model.memory import Memory
from hpc.model.part import Part

# Leaves over all clients are strided, which a row for each client needs; measured, it costs nothing.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(kw_only=True, frozen=True)
class Grouping:
    """Whose rows a forward pass holds; clients are given as rows of `Replicas.values_KN`."""

    owners: tuple[int, ...]
    """The owner of each group of adjacent rows."""
    sizes: tuple[int, ...]
    """Number of rows of each group."""
    tokens: int
    entries: tuple[int, ...]
    """Owners of the entries of batched products: the groups where all have one size, else the rows."""

    @staticmethod
    def of(owners: Sequence[int], sizes: Sequence[int], tokens: int) -> Grouping:
        rows = [owner for owner, size in zip(owners, sizes, strict=True) for _ in range(size)]
        entries = owners if len(set(sizes)) == 1 else rows
        return Grouping(owners=tuple(owners), sizes=tuple(sizes), tokens=tokens, entries=tuple(entries))

    @property
    def rows(self) -> int:
        return sum(self.sizes)


@dataclass
class Now:
    """The grouping of the pass that runs at this moment; none between passes."""

    grouping: Grouping | None = None

    def get(self) -> Grouping:
        if self.grouping is None:
            raise RuntimeError("replicas run inside Replicas.forward; recompute with Replicas.checkpoint_activations")
        return self.grouping

    @contextmanager
    def at(self, grouping: Grouping) -> Iterator[None]:
        before, self.grouping = self.grouping, grouping
        try:
            yield
        finally:
            self.grouping = before


class Stacked:
    """One trainable tensor of all clients: views of `values_KN`, with views of `grads_KN` as their gradients.

    A leaf for all clients and one for each: autograd adds to `grads_KN` in place either way, and a pass of few clients
    neither copies nor zeroes the others' gradients.
    """

    def __init__(self, values_KX: torch.Tensor, grads_KX: torch.Tensor) -> None:
        self.all_KX = leaf(values_KX, grads_KX)
        self.each_X = [leaf(values_X, grad_X) for values_X, grad_X in zip(values_KX, grads_KX, strict=True)]
        self._everybody = tuple(range(len(self.each_X)))

    def take(self, entries: tuple[int, ...]) -> torch.Tensor:
        """The values of these clients, `_GX`; no copy where they are all clients in order."""
        return self.all_KX if entries == self._everybody else torch.stack([self.each_X[k] for k in entries])


def leaf(values: torch.Tensor, grad: torch.Tensor) -> nn.Parameter:
    """A leaf over the memory of `values` that accumulates in the memory of `grad`."""
    parameter = nn.Parameter(values)
    parameter.grad = grad
    return parameter


class ReplicaLora(nn.Module):
    """In place of PEFT's LoRA layer: the same operations in the same order, each row with its own client's factors."""

    def __init__(self, name: str, layer: Any, factors: Mapping[int, Stacked], now: Now) -> None:
        super().__init__()
        (adapter,) = layer.active_adapters
        self.name, self._now = name, now
        self.base_layer: Any = layer.base_layer
        self.dropout: nn.Module = layer.lora_dropout[adapter]
        self.scaling: float = layer.scaling[adapter]
        self.down, self.up = (factors[id(side[adapter].weight)] for side in (layer.lora_A, layer.lora_B))

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's, as PEFT's layers have it: some models ask for its dtype."""
        weight: nn.Parameter = self.base_layer.weight
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` is `_BTI`, or `_MI` with the rows one after the other."""
        result: torch.Tensor = self.base_layer(x)
        x = self.dropout(x.to(self.down.all_KX.dtype))
        return (result + self._update(x) * self.scaling).to(result.dtype)

    def _update(self, x: torch.Tensor) -> torch.Tensor:
        grouping = self._now.get()
        if len(grouping.owners) == 1:
            k = grouping.owners[0]
            return F.linear(F.linear(x, self.down.each_X[k]), self.up.each_X[k])
        self._require_all_rows(x, grouping)
        x_GMI = x.reshape(len(grouping.entries), -1, x.shape[-1])
        down_GRI, up_GOR = self.down.take(grouping.entries), self.up.take(grouping.entries)
        y_GMO = torch.bmm(torch.bmm(x_GMI, down_GRI.mT), up_GOR.mT)
        return y_GMO.view(*x.shape[:-1], y_GMO.shape[-1])

    def _require_all_rows(self, x: torch.Tensor, grouping: Grouping) -> None:
        """Routed experts see tokens picked from all rows: whose they are is lost here."""
        if not (x.dim() >= 3 and x.shape[0] == grouping.rows) and x.shape[0] != grouping.rows * grouping.tokens:
            raise ModelError(
                f"{self.name} does not see whole rows in order, so no client can have LoRA factors of its own in it; "
                "leave it out of --adapter.target_modules"
            )


class Weights:
    """Lets a module run with one client's values; between runs it holds none of its own."""

    def __init__(self, module: nn.Module, values: Mapping[int, Stacked]) -> None:
        places = [(owner, n, p) for owner in module.modules() for n, p in owner.named_parameters(recurse=False)]
        self._places = [(owner, name, values[id(p)]) for owner, name, p in places if id(p) in values]
        self._empty = nn.Parameter(torch.empty(0), requires_grad=False)
        self._clear()

    @contextmanager
    def of(self, k: int) -> Iterator[None]:
        # Not functional_call: recomputation in backward needs the values to be put in place by a context manager.
        for owner, name, values in self._places:
            owner._parameters[name] = values.each_X[k]
        try:
            yield
        finally:
            self._clear()

    def _clear(self) -> None:
        for owner, name, _ in self._places:
            owner._parameters[name] = self._empty


class ReplicaPrefix(nn.Module):
    """In place of a part's prefix: each row gets the keys and values of its own client's encoder."""

    def __init__(self, prefix: Prefix, values: Mapping[int, Stacked], now: Now) -> None:
        super().__init__()
        self.prefix, self._now = prefix, now
        self._weights = Weights(prefix, values)

    def forward(self, rows: int) -> object:
        """A `DynamicCache`, as `Prefix.forward` gives."""
        grouping = self._now.get()
        encoded = []
        for k in grouping.owners:
            with self._weights.of(k):
                encoded.append(self.prefix.encode())
        return self.prefix.cache(encoded, grouping.sizes)


class Replicas:
    """The trainable values of several clients over one part.

    `values_KN` and `grads_KN` hold one row for each client, in float32; everything that is done to a client's values as
    a whole (optimiser, norm, average, checkpoint) is done to its row. The part itself has nothing left that learns.
    """

    def __init__(self, part: Part, clients: Sequence[int], *, device: torch.device) -> None:
        """All clients start from the values that the part has. It cannot run on its own afterwards."""
        self.part, self.clients = part.to(device), list(clients)
        self._index = {client: k for k, client in enumerate(self.clients)}
        trainable = part.trainable()
        self._shapes = {name: p.shape for name, p in trainable.items()}
        size = sum(p.numel() for p in trainable.values())
        self.values_KN = torch.empty(len(self.clients), size, device=device)
        self.grads_KN = torch.zeros_like(self.values_KN)
        self._now = Now()
        self._whole = self._take_over(trainable) if trainable else None

    @property
    def names(self) -> list[str]:
        """What learns, by its name in the uncut model, in the order of `Part.trainable()`."""
        return list(self._shapes)

    def _take_over(self, trainable: Mapping[str, nn.Parameter]) -> Weights | None:
        """Move what learns from the part to `values_KN`. The result is for `full`, which runs client by client."""
        from peft.tuners.lora import LoraLayer

        values, grads = self.split(self.values_KN), self.split(self.grads_KN)
        stacked: dict[int, Stacked] = {}
        for name, parameter in trainable.items():
            values[name].copy_(parameter.detach())
            stacked[id(parameter)] = Stacked(values[name], grads[name])
        lora = {n: m for n, m in self.part.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in lora.items():
            self.part.set_submodule(name, ReplicaLora(self.part.whole_name(name), layer, stacked, self._now))
        if isinstance(self.part.prefix, Prefix):
            self.part.prefix = ReplicaPrefix(self.part.prefix, stacked, self._now)
        elif not lora:
            return Weights(self.part, stacked)
        return None

    def split(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """`_N` or `_KN` (values, gradients, moments) tensor by tensor, as `_X` or `_KX` by name; views."""
        sections = flat.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: section.view(*flat.shape[:-1], *shape)
            for (name, shape), section in zip(self._shapes.items(), sections, strict=True)
        }

    def forward(
        self, hidden_BTD: torch.Tensor, groups: Sequence[tuple[int, int]], layout_B2: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`out_BTD`. `groups` are (client id, number of rows) in the order of the rows.

        Raises `KeyError` for a client of another rank, `ValueError` if the groups are not exactly the rows.
        """
        owners, sizes = [self._index[client] for client, _ in groups], [rows for _, rows in groups]
        if sum(sizes) != len(hidden_BTD) or min(sizes, default=0) < 1:
            raise ValueError(f"groups of {sizes} rows for a batch of {len(hidden_BTD)}")
        if self._whole is None:
            return self._run(hidden_BTD, owners, sizes, layout_B2)
        layouts = [None] * len(sizes) if layout_B2 is None else layout_B2.split(sizes)
        passes = zip(hidden_BTD.split(sizes), owners, sizes, layouts, strict=True)
        return torch.cat([self._run(rows_BTD, [owner], [size], told) for rows_BTD, owner, size, told in passes])

    def _run(
        self, hidden_BTD: torch.Tensor, owners: Sequence[int], sizes: Sequence[int], layout_B2: torch.Tensor | None
    ) -> torch.Tensor:
        with self._during(Grouping.of(owners, sizes, hidden_BTD.shape[1])):
            out_BTD: torch.Tensor = self.part(hidden_BTD, layout_B2=layout_B2)
        return out_BTD

    @torch.no_grad()
    def remember(self, client: int, rows: int, layout_B2: torch.Tensor | None = None) -> Memory:
        """An empty memory for rows of this client, holding its prefixes."""
        with self._during(Grouping.of([self._index[client]], [rows], 1)):
            return self.part.remember(rows, layout_B2)

    @torch.no_grad()
    def extend(self, client: int, hidden_BTD: torch.Tensor, memory: Memory, mask_BT: torch.Tensor) -> torch.Tensor:
        """`Part.extend` with this client's values."""
        with self._during(Grouping.of([self._index[client]], [memory.rows], hidden_BTD.shape[1])):
            return self.part.extend(hidden_BTD, memory, mask_BT)

    @contextmanager
    def _during(self, grouping: Grouping) -> Iterator[None]:
        weights = nullcontext() if self._whole is None else self._whole.of(grouping.owners[0])
        with self._now.at(grouping), weights:
            yield

    def checkpoint_activations(self) -> None:
        """Recompute the blocks in backward, for the clients whose rows each forward pass had."""

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), self._during(self._now.get())

        self.part.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
        self.part.train()

    def row(self, client: int) -> nn.Parameter:
        """All that a client trains as one flat leaf `_N`, its gradient included; shares their memory."""
        k = self._index[client]
        return leaf(self.values_KN[k], self.grads_KN[k])

    def named(self, client: int) -> dict[str, torch.Tensor]:
        """A client's values by name; views."""
        return self.split(self.values_KN[self._index[client]])

    @torch.no_grad()
    def load(self, client: int, values: Mapping[str, torch.Tensor]) -> None:
        """Set a client's values. Raises `KeyError` for a missing name."""
        for name, own in self.named(client).items():
            own.copy_(values[name])
