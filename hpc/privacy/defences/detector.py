"""Whether the gradients that come back follow from those that were sent: a client's watch on its trunk.

An honest trunk carries a gradient back through its blocks, so
- what it returns is 0 behind the last position that the client's gradient reaches in a row (blocks are causal);
- rows whose sent gradients are alike come back alike, and rows that differ (another label) come back different.
A server that trains the client's head for itself (feature-space hijacking) returns gradients that have nothing to do
with the labels. The second is measured as centred kernel alignment (Kornblith et al., 2019; its unbiased form, Song et
al., 2012) between the directions sent and those returned at each row's last position, over the last `WINDOW` rows. As a
hijacker's gradient follows from the activations, and so does part of what a client sends, what the activations explain
of both is taken out (as in the partial distance correlation of Székely and Rizzo, 2014): near 0 or below for a
hijacker. Where the plain alignment is all but 1, nothing that could be judged is left, and nothing is suspected. The
idea that an honest gradient separates labels is that of Fu et al., 2023 ("Focusing on Pinocchio's Nose"). The angle
between a row's own sent and returned gradients says nothing: through SmolLM2's 28 blocks it is a right one.

`SUSPICIOUS` and `ENOUGH` were chosen on ward notes from seeds 101 to 104 of the tiny model and 101 and 102 of
SmolLM2-135M, which no test uses. 22 honest runs (client_batch, pipelined, replica, with noise, with max_norm): 0.43 or
more wherever the plain alignment was below 0.9. 18 hijacked runs (LoRA and full, 1 and 2 blocks): at most 0.25 at the
first figure (16 rows, step 4 of 4 rows), at most 0.28 then, with plain alignments up to 0.84; by a plain alignment
below 0.35, 3 of them would not have been found in 16 steps.

A server that mixes enough of the honest gradient into its own is not found; its attack is the weaker for it. Nor is
anything found while all gradients that are sent point in one direction, as nothing can then be told apart.

Shape suffixes: B rows, T tokens, D hidden size, N rows of the window.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Literal

import torch

from hpc.errors import TrunkSuspected

WINDOW = 32  # rows
LEAST_ROWS = 16  # of fewer, chance decides too much
LEAST_SPREAD = 1e-3  # mean squared centred similarity of what was sent, below which there is nothing to tell apart
SUSPICIOUS = 0.3  # alignment beyond what the activations explain
ENOUGH = 0.9  # plain alignment from which on nothing is suspected
LEAST_STRAY = 1e-3  # share of a returned gradient's length that may lie where none can be: rounding of other kernels

_log = logging.getLogger("hpc")


class Detector:
    """Of one client, over its steps. It begins anew in a run that is resumed."""

    def __init__(self, mode: Literal["warn", "stop"]) -> None:
        self._stops = mode == "stop"
        self._rows: deque[tuple[torch.Tensor, ...]] = deque(maxlen=WINDOW)  # sent, returned, smashed
        self._sent: dict[int, torch.Tensor] = {}
        self.alignment: float | None = None
        """Of the window, plain; None while there is too little to judge by."""
        self.beyond: float | None = None
        """What of it the activations do not explain."""
        self.noticed: int | None = None
        """The first step, from 0, with anything suspicious."""

    def sent(self, piece: int, grad_BTD: torch.Tensor) -> None:
        """The gradient of a piece of the batch, as it left."""
        self._sent[piece] = grad_BTD.detach().float()

    def returned(
        self, step: int, piece: int, grad_BTD: torch.Tensor, lengths: Sequence[int], smashed_BTD: torch.Tensor
    ) -> None:
        """What came back for it, before it is used, and the activations that it is of, as they left.

        Raises `TrunkSuspected` in mode `stop`.
        """
        sent_BTD, grad_BTD = self._sent.pop(piece), grad_BTD.detach().float()
        if not (sent_BTD.isfinite().all() and grad_BTD.isfinite().all()):
            if any(row and not sent_BTD[place].isfinite().all() for place, row in enumerate(_finite_answers(grad_BTD))):
                self._suspect(step, "the trunk returned a finite gradient for one that was not")
            return  # a step that is left out
        ends = [_end(row_TD[:length]) for row_TD, length in zip(sent_BTD, lengths, strict=True)]
        stray = stray_share(grad_BTD, ends)
        if stray > LEAST_STRAY:
            self._suspect(
                step, f"{stray:.1%} of the gradient that the trunk returned is at positions that no label can reach"
            )
        for row, end in enumerate(ends):
            if end:
                of_row = (
                    each_BTD[row, end - 1].cpu() for each_BTD in (sent_BTD, grad_BTD, smashed_BTD.detach().float())
                )
                self._rows.append(tuple(of_row))
        self._judge()
        if (
            self.alignment is not None
            and self.beyond is not None
            and self.alignment < ENOUGH
            and self.beyond < SUSPICIOUS
        ):
            self._suspect(
                step,
                f"the gradients that the trunk returned do not follow from those that were sent (alignment "
                f"{self.beyond:.2f} over {len(self._rows)} rows; an honest trunk has {SUSPICIOUS} or more)",
            )

    def _judge(self) -> None:
        self.alignment = self.beyond = None
        if len(self._rows) >= LEAST_ROWS:
            sent_ND, returned_ND, smashed_ND = (torch.stack(rows) for rows in zip(*self._rows, strict=True))
            self.alignment = alignment(sent_ND, returned_ND)
            if self.alignment is not None:
                self.beyond = beyond(sent_ND, returned_ND, smashed_ND)

    def _suspect(self, step: int, why: str) -> None:
        is_first, self.noticed = self.noticed is None, step if self.noticed is None else self.noticed
        if self._stops:
            raise TrunkSuspected(
                f"step {step + 1}: {why}. Nothing of it was used. The trunk may be training this client's head to leak "
                "its text; ask who runs it, or use --privacy.detector warn to go on"
            )
        if is_first:
            _log.warning("step %d: %s; it may be training this client's head to leak its text", step + 1, why)


def make_detector(mode: Literal["off", "warn", "stop"]) -> Detector | None:
    """What the configuration asks for."""
    return None if mode == "off" else Detector(mode)


def _finite_answers(grad_BTD: torch.Tensor) -> list[bool]:
    """Of each row whether it has a gradient, and all of it is finite: no block makes that of one that is not."""
    found: list[bool] = (grad_BTD.isfinite().flatten(1).all(1) & grad_BTD.ne(0).flatten(1).any(1)).tolist()
    return found


def _end(sent_TD: torch.Tensor) -> int:
    """Number of positions up to the last one with a gradient; 0: there is none."""
    reached = sent_TD.abs().amax(-1).nonzero()
    return int(reached[-1]) + 1 if len(reached) else 0


def stray_share(returned_BTD: torch.Tensor, ends: Sequence[int]) -> float:
    """Share (of the length) of the returned gradient that lies behind each row's `ends`; padding counts."""
    behind_BT = torch.arange(returned_BTD.shape[1])[None] >= torch.tensor(ends)[:, None]
    whole = float(returned_BTD.norm())
    return float(returned_BTD[behind_BT.to(returned_BTD.device)].norm()) / whole if whole else 0.0


def alignment(one_ND: torch.Tensor, other_ND: torch.Tensor) -> float | None:
    """Centred kernel alignment of the directions in `one_ND` with those in `other_ND`: 1 if all angles agree.

    Unbiased, so unrelated directions come to 0 on average (a little more or less). None if `one_ND` has but one
    direction; 0 if only `other_ND` has.
    """
    kernels = [_similarities(vectors_ND) for vectors_ND in (one_ND, other_ND)]
    own, others = _dependence(kernels[0], kernels[0]), _dependence(kernels[1], kernels[1])
    if own < LEAST_SPREAD:
        return None
    return _dependence(*kernels) / (own * others) ** 0.5 if others > 1e-9 else 0.0


def beyond(one_ND: torch.Tensor, other_ND: torch.Tensor, known_ND: torch.Tensor) -> float:
    """The alignment of `one_ND` with `other_ND` without what `known_ND` explains of both: a partial correlation."""
    pairs = ((one_ND, other_ND), (one_ND, known_ND), (other_ND, known_ND))
    plain, one, other = (alignment(*pair) or 0.0 for pair in pairs)
    left = max((1 - one**2) * (1 - other**2), 1e-12)
    return (plain - one * other) / left**0.5


def _similarities(vectors_ND: torch.Tensor) -> torch.Tensor:
    """Cosines of all pairs, 0 on the diagonal, `_NN`."""
    unit_ND = torch.nn.functional.normalize(vectors_ND.double(), dim=-1, eps=1e-30)
    return (unit_ND @ unit_ND.T).fill_diagonal_(0)


def _dependence(one_NN: torch.Tensor, other_NN: torch.Tensor) -> float:
    """The unbiased estimate of the Hilbert-Schmidt independence criterion (Song et al., 2012, equation 5)."""
    n = len(one_NN)
    products = (one_NN * other_NN).sum()
    totals = one_NN.sum() * other_NN.sum() / ((n - 1) * (n - 2))
    margins = 2 * (one_NN.sum(0) @ other_NN.sum(0)) / (n - 2)
    return float(products + totals - margins) / (n * (n - 3))
