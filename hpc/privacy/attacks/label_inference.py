"""What the gradient that a client sends back tells of its labels: where they are, and which.

Only a label makes a gradient. A tail with blocks spreads it to the positions before the label through attention, but
the label's own stands out, and in a causal tail nothing at all arrives behind the last one. Which label: the gradient
that the public tail would give for each candidate is compared with what came (gradient matching; Zhu et al., 2019,
"Deep Leakage from Gradients"), from the last label of a row to the first, each one's share taken out in turn.

Shape suffixes: B rows, T tokens, S valid tokens of all rows together, D hidden size, L label positions, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from hpc.errors import DataError
from hpc.model.part import LabelPositions, Part
from hpc.privacy.attack_options import LabelOptions
from hpc.privacy.seen import Seen


@dataclass(kw_only=True, frozen=True)
class LabelGuess:
    """Labels of one batch, row by row as in `Truth`, and for each valid token how much it looks like a label's."""

    rows: tuple[int, ...]
    positions: tuple[int, ...]
    ids: tuple[int, ...]
    strengths: tuple[float, ...]
    """Length of the gradient at each valid token, relative to the longest of its row."""


def infer_labels(victim: Sequence[Seen], *, tail: Part, options: LabelOptions) -> list[LabelGuess]:
    """Positions and ids of the labels of each batch; `tail`: public last blocks, norm and LM head.

    Raises `DataError` where gradients or the trunk's own answers were not recorded.
    """
    return [_of_batch(seen, tail, options) for seen in victim]


def _of_batch(seen: Seen, tail: Part, options: LabelOptions) -> LabelGuess:
    if seen.grad_trunk_out_SD is None or seen.trunk_out_SD is None:
        raise DataError(
            f"the recording of client {seen.client_id} at step {seen.step} has no gradient, or not what the trunk "
            "answered: labels are inferred from training steps only; record some"
        )
    lengths = list(seen.lengths)
    grads, answers = seen.grad_trunk_out_SD.split(lengths), seen.trunk_out_SD.split(lengths)
    norms = [grad_TD.norm(dim=-1) for grad_TD in grads]
    strengths = [norms_T / norms_T.max().clamp_min(1e-30) for norms_T in norms]
    places = _as_many_as_named([label_positions(n, gap=options.gap) for n in norms], strengths, seen.label_tokens)
    ids = [label_ids(*row, tail, options) for row in zip(grads, answers, places, strict=True)]
    return LabelGuess(
        rows=tuple(row for row, positions in enumerate(places) for _ in positions),
        positions=tuple(chain.from_iterable(places)),
        ids=tuple(chain.from_iterable(ids)),
        strengths=tuple(torch.cat(strengths).tolist()),
    )


def _as_many_as_named(places: list[list[int]], strengths: Sequence[torch.Tensor], label_tokens: int) -> list[list[int]]:
    """`places`, unless the client names another number of labels with its batch (0: none): then the strongest."""
    if label_tokens in (0, sum(map(len, places))):
        return places
    all_S = torch.cat(list(strengths))
    chosen_S = torch.zeros_like(all_S, dtype=torch.bool)
    chosen_S[all_S.topk(min(label_tokens, len(all_S))).indices] = True
    return [row.nonzero()[:, 0].tolist() for row in chosen_S.split([len(row) for row in strengths])]


def label_positions(norms_T: torch.Tensor, *, gap: float) -> list[int]:
    """Positions whose gradient does not come from a later one's label, in order.

    The last position with any gradient is one. So are all whose norm lies above the widest step between two successive
    norms (as a ratio), if that step is at least `gap`. Attention of a tail with blocks reaches the first position: if
    nothing arrived there, there is none, and whatever has a gradient has a label.
    """
    reached = norms_T.nonzero()[:, 0].tolist()
    if not reached or norms_T[0] == 0 or len(reached) < 2:
        return reached
    falling, order = norms_T[reached].sort(descending=True)
    ratios = falling[:-1] / falling[1:]
    widest = int(ratios.argmax())
    strong = {reached[i] for i in order[: widest + 1].tolist()} if float(ratios[widest]) >= gap else set()
    return sorted(strong | {reached[-1]})


def label_ids(
    grad_TD: torch.Tensor, trunk_out_TD: torch.Tensor, positions: Sequence[int], tail: Part, options: LabelOptions
) -> list[int]:
    """The label at each of `positions`, whose gradient under the public tail points most in the direction that came."""
    left_TD = grad_TD.clone()
    ids: list[int] = []
    for position in reversed(positions):
        known = options.candidates or _shortlist(left_TD[position], trunk_out_TD, position, tail, options.shortlist)
        would_be_CTD = torch.stack([_gradient(trunk_out_TD, position, label, tail) for label in known])
        alike_C = torch.cosine_similarity(would_be_CTD[:, position], left_TD[position][None], dim=-1)
        best = int(alike_C.argmax())
        ids.append(known[best])
        own_TD = would_be_CTD[best]
        share = (own_TD[position] @ left_TD[position]) / own_TD[position].square().sum().clamp_min(1e-30)
        left_TD -= share * own_TD
    return ids[::-1]


def _logits(trunk_out_TD: torch.Tensor, position: int, tail: Part) -> torch.Tensor:
    """`_V`, of what the public tail predicts behind `position`; later positions play no part."""
    at = LabelPositions(row_L=torch.zeros(1, dtype=torch.int64), position_L=torch.tensor([position]))
    logits_V: torch.Tensor = tail(trunk_out_TD[None], at)[0].float()
    return logits_V


def _gradient(trunk_out_TD: torch.Tensor, position: int, label: int, tail: Part) -> torch.Tensor:
    """`_TD`: of the loss of this label at this position, under the public tail."""
    inputs_TD = trunk_out_TD.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(_logits(inputs_TD, position, tail)[None], torch.tensor([label]))
    return torch.autograd.grad(loss, inputs_TD)[0]


def _shortlist(left_D: torch.Tensor, trunk_out_TD: torch.Tensor, position: int, tail: Part, size: int) -> list[int]:
    """Tokens whose logit would rise most, were the hidden state moved a little against the gradient."""
    moved_TD = trunk_out_TD.clone()
    step = 1e-2 * trunk_out_TD[position].norm() / left_D.norm().clamp_min(1e-30)
    moved_TD[position] -= step * left_D
    with torch.no_grad():
        rise_V = _logits(moved_TD, position, tail) - _logits(trunk_out_TD, position, tail)
    best: list[int] = rise_V.topk(min(size, len(rise_V))).indices.tolist()
    return best
