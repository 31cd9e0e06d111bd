"""A malicious server that trains its clients' heads for itself: feature-space hijacking.

After Pasquini, Ateniese and Bernaschi, "Unleashing the Tiger: Inference Attacks on Split Learning" (CCS 2021). The
server has text of its own and three networks: a pilot, which maps embeddings of that text to features; its inverse,
which names the tokens again; and a discriminator, which tells the pilot's features from a client's smashed activations.
Instead of the gradient of the client's loss, it returns that of fooling the discriminator, so the client's head learns
to make features like the pilot's, which the inverse can read.

The pilot starts as the identity on the public embedding table: what it asks of a client's head is to undo its blocks.

Shape suffixes: S valid tokens of all rows together, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as sureness

from hpc.errors import DataError
from hpc.privacy.attack_options import HijackOptions
from hpc.privacy.attacks.networks import TiedNamer
from hpc.privacy.seen import Seen


class Pilot(nn.Module):
    """Embeddings `_SD` → features `_SD`; the identity before it has learned."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        last = nn.Linear(hidden, size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.more = nn.Sequential(nn.Linear(size, hidden), nn.GELU(), last)

    def forward(self, embeddings_SD: torch.Tensor) -> torch.Tensor:
        features_SD: torch.Tensor = embeddings_SD + self.more(embeddings_SD)
        return features_SD


class Discriminator(nn.Module):
    """How sure it is (a logit, `_S`) that features are the pilot's, position by position."""

    unit_D: torch.Tensor
    mean_D: torch.Tensor

    def __init__(self, known_SD: torch.Tensor, hidden: int) -> None:
        """`known_SD`: features whose mean and spread are taken out first."""
        super().__init__()
        self.register_buffer("mean_D", known_SD.mean(0))
        self.register_buffer("unit_D", known_SD.std(0).clamp_min(1e-6))
        size = known_SD.shape[1]
        layers = (nn.Linear(size, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, hidden), nn.LeakyReLU(0.2))
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, 1))

    def forward(self, features_SD: torch.Tensor) -> torch.Tensor:
        sure_S: torch.Tensor = self.layers((features_SD - self.mean_D) / self.unit_D)[:, 0]
        return sure_S


class Hijacker:
    """The server's networks, and what it makes of a client's smashed activations."""

    def __init__(
        self, shadow: Sequence[Sequence[int]], *, embedding_VD: torch.Tensor, options: HijackOptions, seed: int = 0
    ) -> None:
        """`shadow`: rows of token ids, the server's own text. Raises `DataError` if there is none."""
        ids = [token for row in shadow for token in row]
        if not ids:
            raise DataError("a server that hijacks needs text of its own: shadow rows are missing")
        self._ids_S, self._table_VD, self._options = torch.tensor(ids), embedding_VD, options
        self._draw = torch.Generator().manual_seed(seed)
        size = embedding_VD.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.pilot = Pilot(size, options.hidden)
            self.inverse = TiedNamer(1, embedding_VD)
            self.discriminator = Discriminator(embedding_VD[self._ids_S], options.hidden)
        pair = [*self.pilot.parameters(), *self.inverse.parameters()]
        self._pair_optimiser = torch.optim.Adam(pair, lr=options.pilot_learning_rate)
        self._optimiser = torch.optim.Adam(self.discriminator.parameters(), lr=options.learning_rate, betas=(0.5, 0.9))

    def gradient(self, smashed_SD: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """What to return for these activations, `_SD`: of the mean over positions of how sure it is that they are not
        the pilot's. The server's networks learn a step, or some, first."""
        self._learn_to_name()
        for _ in range(self._options.turns):
            self._learn_to_tell(smashed_SD)
        hijacked_SD = smashed_SD.detach().clone().requires_grad_()
        sure_S = self.discriminator(hijacked_SD)
        return torch.autograd.grad(sureness(sure_S, torch.ones_like(sure_S)), hijacked_SD)[0]

    @torch.no_grad()
    def invert(self, victim: Sequence[Seen]) -> list[list[list[int]]]:
        """Guesses of the inverse network for activations of a head that was hijacked."""
        found = []
        for seen in victim:
            ids_S = torch.cat([self._named(piece_SD).argmax(-1) for piece_SD in seen.smashed_SD.split(1024)])
            found.append([row.tolist() for row in ids_S.split(list(seen.lengths))])
        return found

    def _named(self, features_SD: torch.Tensor) -> torch.Tensor:
        nothing_read_S1 = torch.zeros(len(features_SD), 1)
        return self.inverse.logits(self.inverse(nothing_read_S1, features_SD), None)

    def _own_text(self) -> torch.Tensor:
        """Some tokens of it, `_S`."""
        size = min(self._options.shadow_tokens, len(self._ids_S))
        return self._ids_S[torch.randint(len(self._ids_S), (size,), generator=self._draw)]

    def _learn_to_name(self) -> None:
        ids_S = self._own_text()
        loss = nn.functional.cross_entropy(self._named(self.pilot(self._table_VD[ids_S])), ids_S)
        self._pair_optimiser.zero_grad()
        loss.backward()
        self._pair_optimiser.step()

    def _learn_to_tell(self, smashed_SD: torch.Tensor) -> None:
        with torch.no_grad():
            own_SD = self.pilot(self._table_VD[self._own_text()])
        own_SD.requires_grad_()
        own_S, others_S = self.discriminator(own_SD), self.discriminator(smashed_SD.detach())
        (slope_SD,) = torch.autograd.grad(own_S.sum(), own_SD, create_graph=True)
        steepness = (slope_SD * self.discriminator.unit_D).square().sum(-1).mean()
        wrong = sureness(own_S, torch.ones_like(own_S)) + sureness(others_S, torch.zeros_like(others_S))
        self._optimiser.zero_grad()
        (wrong + self._options.penalty / 2 * steepness).backward()
        self._optimiser.step()
