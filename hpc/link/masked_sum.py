"""The server's side of secure aggregation (`hpc.link.masks`): it adds up, and takes masks off sums only.

Suffix: N elements of a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from hpc.errors import ProtocolError
from hpc.link.identity import client_name
from hpc.link.masks import (
    add_mask,
    checked_cohort,
    checked_survivors,
    decode_fixed,
    pack_tags,
    shown,
    sign,
    unpack,
    unpack_tags,
)


class ServerSum:
    """The server's side of one round, or one server rank's part of it. Knows no keys."""

    def __init__(self, cohort: Iterable[int], round_number: int, *, size: int | None = None) -> None:
        """`size`: N, which a rank that may get no vector must be told."""
        self._cohort, self._round = checked_cohort(cohort), round_number
        self._total_N = None if size is None else torch.zeros(size, dtype=torch.int64)
        self._added: set[int] = set()

    def add(self, client: int, y_N: torch.Tensor) -> None:
        """Take up a client's vector. Raises ProtocolError: not of the cohort, again, another dtype or length."""
        who = f"round {self._round}: {client_name(client)}"
        if client not in self._cohort:
            raise ProtocolError(f"{who} is not in the cohort {self._cohort}")
        if client in self._added:
            raise ProtocolError(f"{who} sent a second vector")
        size = y_N.numel() if self._total_N is None else self._total_N.numel()
        if y_N.dtype != torch.int64 or y_N.shape != (size,):
            raise ProtocolError(f"{who} sent {shown(y_N)}; int64 [{size}] was due")
        self._total_N = y_N.cpu().clone() if self._total_N is None else self._total_N.add_(y_N.cpu())
        self._added.add(client)

    def survivors(self) -> tuple[int, ...]:
        """Whose vectors came to this rank, ascending."""
        return tuple(sorted(self._added))

    def missing(self) -> tuple[int, ...]:
        """Whose did not, ascending."""
        return tuple(client for client in self._cohort if client not in self._added)

    def unmask(self, revealed: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """The sum, float64 [N], where one rank has everything. Raises as `unmask_partial`."""
        return decode_fixed(self.unmask_partial(self.survivors(), revealed))

    def unmask_partial(self, survivors: Sequence[int], revealed: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """int64 [N]; added up over the server ranks mod 2**64, `decode_fixed` makes it the sum over the survivors.

        `survivors`: of all ranks. `revealed`: this rank's clients → what their `reveal` gave.
        Raises ProtocolError: too few or unknown survivors, a client too many or too few, another dtype or shape.
        """
        roster = checked_survivors(self._cohort, survivors)
        if revealed.keys() != self._added or not self._added <= set(roster):
            raise ProtocolError(
                f"round {self._round}: vectors came from {self.survivors()}, seeds from {tuple(sorted(revealed))}, "
                f"and the survivors are {roster}"
            )
        if self._total_N is None:
            raise ProtocolError(f"round {self._round}: no vector came to this rank and its length was not given")
        lost = [client for client in self._cohort if client not in roster]
        total_N = self._total_N.clone()
        for client, rows in revealed.items():
            own, *pairs = unpack(rows, 1 + len(lost), f"the seeds of {client_name(client)}")
            add_mask(total_N, own, -1)
            for other, seed in zip(lost, pairs, strict=True):
                add_mask(total_N, seed, -sign(client, other))
        return total_N


def relay_tags(survivors: Sequence[int], sent: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    """Sender → its tags becomes receiver → tags for it, both uint8 [survivors - 1, 32]. Raises ProtocolError."""
    if sorted(sent) != sorted(survivors):
        raise ProtocolError(f"tags came from {tuple(sorted(sent))}; the survivors are {tuple(survivors)}")
    tags = {frm: unpack_tags(rows, survivors, but=frm) for frm, rows in sent.items()}
    return {to: pack_tags({frm: tags[frm][to] for frm in sent if frm != to}) for to in sent}
