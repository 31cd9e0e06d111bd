"""Attack (d) is exact as long as the head is the public one, at whichever block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpc.config import PrivacyConfig
from hpc.errors import ModelError
from hpc.privacy.attack_config import CausalSearchConfig
from hpc.privacy.attacks.causal_search import causal_search
from hpc.privacy.attacks.nearest_embedding import nearest_embedding
from tests.unit.attack_case import draw_rows, plain_hidden, public_model, seen_from

LENGTHS = (6, 11, 4)
ALL = CausalSearchConfig(candidates=0, clear=0)


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_causal_search_is_exact_through_public_blocks(family: str, blocks: int, tmp_path: Path) -> None:
    public = public_model(family, blocks, tmp_path)
    rows = draw_rows(public.vocabulary, LENGTHS)
    seen = seen_from(rows, plain_hidden(family, tmp_path, rows, block=blocks))
    assert causal_search(seen, public, ALL) == [rows[:2], rows[2:]]
    if blocks == 2:  # what it adds: by embeddings alone much is lost
        assert nearest_embedding(seen, public) != [rows[:2], rows[2:]]


@pytest.mark.parametrize("blocks", [0, 1])
def test_clipping_alone_hides_nothing_from_who_knows_of_it(blocks: int, tmp_path: Path) -> None:
    """All rows but those of zeros (padding's) become equally long: by plain distance the shortest outputs would win."""
    public = public_model("llama", blocks, tmp_path)
    rows = draw_rows(public.vocabulary, LENGTHS)
    hidden = plain_hidden("llama", tmp_path, rows, block=blocks)
    norms_S1 = torch.cat(hidden).norm(dim=-1, keepdim=True)
    norm = 0.5 * float(norms_S1[norms_S1 > 0].min())
    seen = seen_from(rows, [row_TD * (norm / row_TD.norm(dim=-1, keepdim=True)).clamp(max=1) for row_TD in hidden])
    public.config = replace(public.config, privacy=PrivacyConfig(clip_norm=norm))
    assert causal_search(seen, public, ALL) == [rows[:2], rows[2:]]
    if blocks == 0:
        assert nearest_embedding(seen, public) == [rows[:2], rows[2:]]
        public.config = replace(public.config, privacy=PrivacyConfig())
        assert nearest_embedding(seen, public) != [rows[:2], rows[2:]]


def test_the_likeliest_come_first(tmp_path: Path) -> None:
    """8 of 256 candidates, drawn, would hold the right one in 3 of 100 positions."""
    public = public_model("tiny-llama", 1, tmp_path)
    rows = draw_rows(public.vocabulary, (12, 9))
    with torch.no_grad():
        seen = seen_from(rows, [public.head(torch.tensor([row]))[0] for row in rows])
    guesses = [batch[0] for batch in causal_search(seen, public, CausalSearchConfig(candidates=8))]
    hits = sum(a == b for guess, row in zip(guesses, rows, strict=True) for a, b in zip(guess, row, strict=True))
    assert hits > 21 / 2


def test_with_one_candidate_it_is_only_the_order(tmp_path: Path) -> None:
    """The first position has no context, so the order is exact there; the search needs more further on."""
    public = public_model("llama", 2, tmp_path)
    rows = draw_rows(public.vocabulary, (20, 20))
    with torch.no_grad():
        seen = seen_from(rows, [public.head(torch.tensor([row]))[0] for row in rows])
    guesses = causal_search(seen, public, CausalSearchConfig(candidates=1))
    assert [batch[0][0] for batch in guesses] == [rows[0][0], rows[1][0]]
    assert guesses != [rows[:1], rows[1:]]


def test_the_nearest_is_taken_where_nothing_fits_exactly(tmp_path: Path) -> None:
    """Noise far below the distance between tokens, far above rounding: no early end, and the same answer."""
    public = public_model("llama", 1, tmp_path)
    rows = draw_rows(public.vocabulary, LENGTHS)
    torch.manual_seed(0)
    with torch.no_grad():
        hidden = [public.head(torch.tensor([row]))[0] for row in rows]
    noisy = [row_TD + 0.02 * row_TD.std() * torch.randn_like(row_TD) for row_TD in hidden]
    assert causal_search(seen_from(rows, noisy), public, ALL) == [rows[:2], rows[2:]]


def test_activations_that_are_not_finite_get_some_guess(tmp_path: Path) -> None:
    public = public_model("llama", 1, tmp_path)
    seen = seen_from([[1, 2], [3]], [torch.full((2, 32), torch.nan), torch.full((1, 32), torch.inf)])
    assert [[len(row) for row in batch] for batch in causal_search(seen, public, ALL)] == [[2], [1]]


def test_a_head_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    public = public_model("llama", 1, tmp_path)
    public.head.needs_layout = True
    with pytest.raises(ModelError, match="see only those before them"):
        causal_search(seen_from([[1], [2]], [torch.zeros(1, 32)] * 2), public, ALL)
