"""Attack (d): token by token, the one that the public head turns into what was seen, given the tokens found before.

A head's output at a position depends on the tokens up to there alone, and those before are known by then. So each
position is a search over the vocabulary, which needs no training data. Exact as long as the victim's head is the public
one: at block 0, with a frozen head, or before it has learned. Keys and values of the tokens found are kept.

Shape suffixes: T tokens of one row, V vocabulary, C candidates, D hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hpc.errors import ModelError
from hpc.model.memory import Memory
from hpc.model.part import Part
from hpc.privacy.attack_config import CausalSearchConfig
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.seen import Seen

_FIRST, _MORE = 8, 256  # candidates tried at once: the likeliest few, then by the hundred
_IDS_AT_ONCE = 2048
# A distance below this share of the vector's own length is rounding: nothing can lie nearer.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def causal_search(seen: Sequence[Seen], public: PublicModel, options: CausalSearchConfig) -> list[list[list[int]]]:
    """Guesses for each batch and row; nothing is drawn.

    Raises `ModelError` for a head whose tokens also see later ones (ChatGLM), or that keeps no keys and values.
    """
    if public.head.needs_layout:
        raise ModelError(
            f"causal_search needs a head whose tokens see only those before them; in "
            f"{public.config.model.name_or_path} they see the whole prompt"
        )
    search = _Search(public=public, candidates=options.candidates or public.vocabulary)
    return [[search.row(row_TD) for row_TD in each.rows_TD()] for each in seen]


@dataclass(kw_only=True)
class _Search:
    public: PublicModel
    candidates: int
    looks: dict[int, _Looks] = field(default_factory=dict)
    """Of each token as the first one (0), and behind one that was found first in some row (1)."""

    @torch.no_grad()
    def row(self, row_TD: torch.Tensor) -> list[int]:
        head, memory = self.public.head, self.public.head.remember(1)
        found: list[int] = []
        shift_D = torch.zeros_like(row_TD[0])
        for position, target_D in enumerate(row_TD):
            looks = self._looks_at(position, found)
            found.append(self._nearest(target_D, looks, shift_D, memory))
            if position:  # what the context makes of one token, it makes of the next, roughly
                shift_D = target_D - looks.outputs_VD[found[-1]]
            head.extend(torch.tensor([found[-1:]]), memory, torch.ones(1, 1, dtype=torch.int64))
        return found

    def _nearest(self, target_D: torch.Tensor, looks: _Looks, shift_D: torch.Tensor, memory: Memory) -> int:
        """The candidate whose output lies nearest; the search ends as soon as none can lie nearer.

        `shift_D`: how far outputs lie from their looks here, as it is guessed for the first few candidates; of these it
        is known, which puts the others in a better order.
        """
        enough = _ROUNDING[self.public.head.model.dtype] * float(target_D.norm())
        few_C = looks.order(target_D - shift_D, min(_FIRST, self.candidates))
        outputs_CD = _outputs(self.public.head, few_C, memory)
        best, least = _least(few_C, outputs_CD, target_D)
        if least <= enough or len(few_C) == self.candidates:
            return best
        shift_D = (outputs_CD - looks.outputs_VD[few_C]).mean(0)
        for ids_C in looks.order(target_D - shift_D, self.candidates).split(_MORE):
            best, least = min(
                (best, least), _least(ids_C, _outputs(self.public.head, ids_C, memory), target_D), key=lambda p: p[1]
            )
            if least <= enough:
                break
        return best

    def _looks_at(self, position: int, found: Sequence[int]) -> _Looks:
        behind = min(position, 1)
        if behind not in self.looks:
            self.looks[behind] = _Looks.of(self.public.head, self.public.vocabulary, found[:behind])
        return self.looks[behind]


@dataclass(kw_only=True)
class _Looks:
    """What each token of the vocabulary looks like behind some other context: who is tried first."""

    outputs_VD: torch.Tensor
    scaled_VD: torch.Tensor
    """In units of `spread_D`, so that the few very large values of some families do not decide alone."""
    squares_V: torch.Tensor
    spread_D: torch.Tensor

    @staticmethod
    @torch.no_grad()
    def of(head: Part, vocabulary: int, before: Sequence[int]) -> _Looks:
        rows = torch.tensor([[*before, id_] for id_ in range(vocabulary)])
        outputs_VD = torch.cat([head(ids)[:, -1].float() for ids in rows.split(_IDS_AT_ONCE)])
        spread_D = outputs_VD.std(0).clamp(min=1e-6)
        scaled_VD = outputs_VD / spread_D
        return _Looks(
            outputs_VD=outputs_VD, scaled_VD=scaled_VD, squares_V=scaled_VD.square().sum(1) / 2, spread_D=spread_D
        )

    def order(self, target_D: torch.Tensor, most: int) -> torch.Tensor:
        """`ids_C`: the likeliest, at most `most`, the best first."""
        scores_V = self.squares_V - self.scaled_VD @ (target_D / self.spread_D)
        return scores_V.topk(min(most, len(scores_V)), largest=False).indices


def _least(ids_C: torch.Tensor, outputs_CD: torch.Tensor, target_D: torch.Tensor) -> tuple[int, float]:
    """The nearest token and its distance."""
    distances_C = (outputs_CD - target_D).norm(dim=-1).nan_to_num(torch.inf)
    place = int(distances_C.argmin())
    return int(ids_C[place]), float(distances_C[place])


def _outputs(head: Part, ids_C: torch.Tensor, memory: Memory) -> torch.Tensor:
    """What each candidate would give as the next token, float32 `_CD`; `memory` stays as it is."""
    tried = copy.deepcopy(memory)
    tried.reorder(torch.zeros(len(ids_C), dtype=torch.int64))
    return head.extend(ids_C[:, None], tried, torch.ones(len(ids_C), 1, dtype=torch.int64))[:, 0].float()
