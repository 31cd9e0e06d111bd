"""Attack (d): token by token, the one that the public head turns into what was seen, given the tokens found before.

A head's output at a position depends on the tokens up to there alone, and those before are known by then. So each
position is a search over the vocabulary, which needs no training data. Exact as long as the victim's head is the public
one: at block 0, with a frozen head, or before it has learned. Keys and values of the tokens found are kept.

Shape suffixes: T tokens of one row, V vocabulary, C candidates, D hidden size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hpc.errors import ModelError
from hpc.model.memory import Memory
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
    search = _Search(public=public, candidates=options.candidates or public.vocabulary, clear=options.clear)
    return [[search.row(row_TD) for row_TD in each.rows_TD()] for each in seen]


@dataclass(kw_only=True)
class _Search:
    public: PublicModel
    candidates: int
    clear: float
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
        """The candidate whose output lies nearest. The search ends as soon as none can lie nearer, or is expected to.

        `shift_D`: how far outputs lie from their looks here, as it is guessed for the first few candidates; of these it
        is known, which puts the others in a better order.
        """
        best = _Best(target_D, rounding=_ROUNDING[self.public.head.model.dtype], clear=self.clear)
        few_C = looks.order(target_D - shift_D, min(_FIRST, self.candidates))
        outputs_CD = _outputs(self.public, few_C, memory)
        best.take(few_C, outputs_CD)
        if best.is_enough or len(few_C) == self.candidates:
            return best.token
        shift_D = (outputs_CD - looks.outputs_VD[few_C]).mean(0)
        for ids_C in looks.order(target_D - shift_D, self.candidates).split(_MORE):
            ids_C = ids_C[~torch.isin(ids_C, few_C)]
            best.take(ids_C, _outputs(self.public, ids_C, memory))
            if best.is_enough:
                break
        return best.token

    def _looks_at(self, position: int, found: Sequence[int]) -> _Looks:
        behind = min(position, 1)
        if behind not in self.looks:
            self.looks[behind] = _Looks.of(self.public, found[:behind])
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
    def of(public: PublicModel, before: Sequence[int]) -> _Looks:
        rows = torch.tensor([[*before, id_] for id_ in range(public.vocabulary)])
        outputs_VD = torch.cat([public.head(ids)[:, -1].float() for ids in rows.split(_IDS_AT_ONCE)])
        outputs_VD = public.as_sent(outputs_VD)
        spread_D = outputs_VD.std(0).clamp(min=1e-6)
        scaled_VD = outputs_VD / spread_D
        return _Looks(
            outputs_VD=outputs_VD, scaled_VD=scaled_VD, squares_V=scaled_VD.square().sum(1) / 2, spread_D=spread_D
        )

    def order(self, target_D: torch.Tensor, most: int) -> torch.Tensor:
        """`ids_C`: the likeliest, at most `most`, the best first."""
        scores_V = self.squares_V - self.scaled_VD @ (target_D / self.spread_D)
        return scores_V.topk(min(most, len(scores_V)), largest=False).indices


class _Best:
    """The nearest of the candidates so far, and how much nearer it is than the next."""

    def __init__(self, target_D: torch.Tensor, *, rounding: float, clear: float) -> None:
        self._target_D, self._clear = target_D, clear
        self._rounding = rounding * float(target_D.norm())
        self.token, self._least, self._next = -1, math.inf, math.inf

    def take(self, ids_C: torch.Tensor, outputs_CD: torch.Tensor) -> None:
        """Some candidates more."""
        distances_C = (outputs_CD - self._target_D).norm(dim=-1).nan_to_num(math.inf)
        for place in distances_C.topk(min(2, len(ids_C)), largest=False).indices.tolist():
            distance = float(distances_C[place])
            if self.token < 0 or distance < self._least:
                self.token, self._least, self._next = int(ids_C[place]), distance, self._least
            else:
                self._next = min(self._next, distance)

    @property
    def is_enough(self) -> bool:
        return self._least <= max(self._rounding, self._clear * self._next if self._next < math.inf else 0.0)


def _outputs(public: PublicModel, ids_C: torch.Tensor, memory: Memory) -> torch.Tensor:
    """What would be sent of each candidate as the next token, float32 `_CD`; `memory` stays as it is."""
    tried = copy.deepcopy(memory)
    tried.reorder(torch.zeros(len(ids_C), dtype=torch.int64))
    outputs_CTD = public.head.extend(ids_C[:, None], tried, torch.ones(len(ids_C), 1, dtype=torch.int64))
    return public.as_sent(outputs_CTD[:, 0].float())
