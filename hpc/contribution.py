"""A client's contribution to a sum over clients: as it is, or under masks that leave the server only the sum."""

from __future__ import annotations

import torch

from hpc.errors import ProtocolError
from hpc.link.frame import Frame, Header
from hpc.link.kinds import Kind
from hpc.link.masks import ClientMasks, noise, pack_tags, unpack_tags
from hpc.link.peers import PeerKeys


class MaskedContribution:
    """One client's vector in one secure round: what it sends, in the order of `hpc.programs`."""

    def __init__(
        self,
        vector_N: torch.Tensor | None,
        *,
        size: int,
        peers: PeerKeys,
        client_id: int,
        cohort: tuple[int, ...],
        step: int,
        context: str,
    ) -> None:
        """`vector_N`: None for one that fixed point cannot hold: noise goes in its place, so that nothing can be said
        about the others' sum either, which nobody will use. `step` numbers the round; `context` is what the server said
        about weights, on which all clients must agree. Raises IdentityError if the key of a client never came.
        """
        self._vector_N, self._size, self._client_id, self._step = vector_N, size, client_id, step
        self._masks = ClientMasks(peers, client_id=client_id, cohort=cohort, round_number=step, context=context)
        self._survivors: list[int] = []
        self._tags: dict[int, bytes] = {}

    def outgoing(self, kind: Kind) -> tuple[Header, torch.Tensor]:
        """The frame of this kind that is due."""
        if kind is Kind.MASKED:
            masked_N = self._masks.mask(torch.zeros(self._size) if self._vector_N is None else self._vector_N)
            tensor = masked_N if self._vector_N is not None else noise(self._size)
        elif kind is Kind.ATTEST:
            tensor = pack_tags(self._masks.attest(self._survivors))
        else:
            tensor = self._masks.reveal(self._survivors, self._tags)
        return Header(kind=kind, step=self._step), tensor

    def take(self, frame: Frame) -> None:
        """The server's answer. Raises ProtocolError for one that makes no sense."""
        tensor = frame.payload
        if frame.header.kind is Kind.TAGS:
            self._tags = unpack_tags(tensor, self._survivors, but=self._client_id)
            return
        if tensor.dtype != torch.int64 or tensor.dim() != 1:
            raise ProtocolError(f"the trunk sent a roster of {tuple(tensor.shape)}, {tensor.dtype}")
        self._survivors = tensor.tolist()
