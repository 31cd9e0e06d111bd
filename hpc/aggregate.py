"""What the trunk ranks agree on among themselves: sums, one client's bytes on all ranks, a joint barrier.

The default process group holds trunk ranks only. Small control values go over Gloo even where the trunk uses NCCL.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist


class TrunkGroup:
    """The trunk ranks of one run. With one rank, nothing is sent."""

    def __init__(self, rank: int, ranks: int, timeout_s: float) -> None:
        self.rank, self.ranks = rank, ranks
        self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)) if ranks > 1 else None

    def rank_of_client(self, client_id: int) -> int:
        """Client k belongs to trunk rank k modulo ranks."""
        return client_id % self.ranks

    def sum(self, value: float) -> float:
        """Sum of one number over the ranks, in float64."""
        return float(self.sum_tensor(torch.tensor([value], dtype=torch.float64))[0])

    def sum_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, on the CPU; in place."""
        if self._control is not None:
            dist.all_reduce(tensor, group=self._control)
        return tensor

    def share(self, data: torch.Tensor | None, *, owner: int) -> torch.Tensor:
        """The owner's bytes (uint8) on every rank; the others pass None."""
        if self._control is None:
            assert data is not None, "the only rank owns everything"
            return data
        size = torch.tensor([0 if data is None else data.numel()])
        dist.broadcast(size, src=owner, group=self._control)
        data = torch.empty(int(size), dtype=torch.uint8) if data is None else data
        dist.broadcast(data, src=owner, group=self._control)
        return data

    def merge(self, counts: dict[int, int], clients: int) -> dict[int, int]:
        """Every client's number, from the ranks that know their own clients'."""
        table = torch.zeros(clients, dtype=torch.int64)
        for client, count in counts.items():
            table[client] = count
        return dict(enumerate(self.sum_tensor(table).tolist()))

    def barrier(self) -> None:
        """Wait for all trunk ranks."""
        if self._control is not None:
            dist.barrier(group=self._control)
