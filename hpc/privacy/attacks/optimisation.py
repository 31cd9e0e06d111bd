"""Recover text by optimising what would have given the smashed activations, through the public first blocks.

The embeddings of a row are treated as free values, as if any point were a token, and moved until the public head's
output matches what was received; then each takes the nearest token. All positions of a row move together: a position
sees only those before it, so its own residual says what it is. From round to round the positions that fit best are
held to their tokens, so that those behind them are matched in a context that is right. The victim's head has an adapter
of its own, so the match is never exact.

Shape suffixes: B rows, T tokens, S valid tokens of all rows together, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from hpc.model.part import Part
from hpc.privacy.attack_options import OptimisationOptions
from hpc.privacy.seen import Seen
from hpc.ragged import pack, pad


def invert_by_optimising(
    victim: Sequence[Seen], *, embedding_VD: torch.Tensor, head: Part, options: OptimisationOptions, seed: int = 0
) -> list[list[list[int]]]:
    """Guesses for `victim` by means of the public head alone: no text of anybody is needed.

    Without blocks in the head, this is the nearest neighbour in the embedding table.
    """
    table_VD = _table(head, len(embedding_VD))
    back = _linear_way_back(head, table_VD, options, seed)
    guesses = []
    for seen in victim:
        rows = seen.rows_TD()
        chunks = [rows[first : first + options.batch_rows] for first in range(0, len(rows), options.batch_rows)]
        guesses.append([ids for chunk in chunks for ids in _invert_rows(chunk, head, table_VD, back, options)])
    return guesses


@torch.no_grad()
def _table(head: Part, vocabulary: int) -> torch.Tensor:
    """What the embedding module gives for each token: the table, with a family's own scale where there is one."""
    table: torch.Tensor = head.model.get_input_embeddings()(torch.arange(vocabulary))
    return table.float()


@contextmanager
def _embeddings_are(head: Part, soft_BTD: torch.Tensor) -> Iterator[None]:
    """Within, the head takes these for its tokens' embeddings."""

    def replaced(module: Any, args: Any, output: Any) -> torch.Tensor:
        return soft_BTD

    hook = head.model.get_input_embeddings().register_forward_hook(replaced)
    try:
        yield
    finally:
        hook.remove()


def _head_of(head: Part, soft_BTD: torch.Tensor) -> torch.Tensor:
    """`smashed_BTD` that the public head gives for these embeddings."""
    with _embeddings_are(head, soft_BTD):
        return head(torch.zeros(soft_BTD.shape[:2], dtype=torch.int64))


@torch.no_grad()
def _linear_way_back(
    head: Part, table_VD: torch.Tensor, options: OptimisationOptions, seed: int
) -> torch.Tensor | None:
    """The least-squares map from the head's outputs (and a one) to embeddings, `_(D+1)D`; None if not wanted."""
    if not options.warm_start_tokens or not head.spec.blocks:
        return None
    draw = torch.Generator().manual_seed(seed)
    rows = max(1, options.warm_start_tokens // 128)
    ids_BT = torch.randint(len(table_VD), (rows, 128), generator=draw)
    known_SD = torch.cat([head(piece_BT).flatten(0, 1) for piece_BT in ids_BT.split(options.batch_rows)])
    inputs = torch.nn.functional.pad(known_SD, (0, 1), value=1.0).double()
    ridge = 1e-3 * inputs.square().mean() * torch.eye(inputs.shape[1], dtype=torch.double) * len(inputs)
    wanted = table_VD[ids_BT.flatten()].double()
    return torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ wanted).float()


def _invert_rows(
    rows: Sequence[torch.Tensor],
    head: Part,
    table_VD: torch.Tensor,
    back: torch.Tensor | None,
    options: OptimisationOptions,
) -> list[list[int]]:
    lengths = [len(row_TD) for row_TD in rows]
    smashed_SD = torch.cat(list(rows))
    start_SD = smashed_SD if back is None else torch.nn.functional.pad(smashed_SD, (0, 1), value=1.0) @ back
    held_S = torch.full((len(smashed_SD),), -1)  # the token that a position is held to
    best_S, error_S = nearest(start_SD, table_VD), torch.full((len(smashed_SD),), torch.inf)
    for number in range(options.rounds if head.spec.blocks else 0):
        found_SD = _optimise(start_SD, held_S, smashed_SD, lengths, head, table_VD, options)
        ids_S = torch.where(held_S >= 0, held_S, nearest(found_SD, table_VD))
        misfit_S = _misfit(ids_S, smashed_SD, lengths, head, table_VD)
        better_S = (misfit_S < error_S) & (held_S < 0)
        best_S, error_S = torch.where(better_S, ids_S, best_S), torch.minimum(misfit_S, error_S)
        settled = error_S.argsort()[: len(error_S) * (number + 1) // options.rounds]
        held_S[settled] = best_S[settled]
        start_SD = found_SD
    return [ids.tolist() for ids in best_S.split(lengths)]


def _optimise(
    start_SD: torch.Tensor,
    held_S: torch.Tensor,
    smashed_SD: torch.Tensor,
    lengths: Sequence[int],
    head: Part,
    table_VD: torch.Tensor,
    options: OptimisationOptions,
) -> torch.Tensor:
    """The embeddings after one round; those of held positions are their tokens'."""
    free_SD = start_SD.clone().requires_grad_()
    held_S1, held_SD = (held_S >= 0)[:, None], table_VD[held_S.clamp_min(0)]
    optimiser = torch.optim.Adam([free_SD], lr=options.learning_rate * float(table_VD.std()))
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, options.steps)
    size_S = smashed_SD.square().sum(-1)
    for _ in range(options.steps):
        optimiser.zero_grad()
        soft_SD = torch.where(held_S1, held_SD, free_SD)
        soft_BTD = pad_sequence(soft_SD.split(list(lengths)), batch_first=True)
        found_SD = pack(_head_of(head, soft_BTD), lengths)
        (((found_SD - smashed_SD).square().sum(-1) / size_S).sum()).backward()
        optimiser.step()
        falling.step()
    return torch.where(held_S1, held_SD, free_SD.detach())


@torch.no_grad()
def _misfit(
    ids_S: torch.Tensor, smashed_SD: torch.Tensor, lengths: Sequence[int], head: Part, table_VD: torch.Tensor
) -> torch.Tensor:
    """Distance of what these tokens give from what was received, relative to that, `_S`."""
    found_SD = pack(_head_of(head, pad(table_VD[ids_S], lengths)), lengths)
    return (found_SD - smashed_SD).norm(dim=-1) / smashed_SD.norm(dim=-1)


def nearest(points_SD: torch.Tensor, table_VD: torch.Tensor, piece: int = 1024) -> torch.Tensor:
    """The token whose embedding is nearest (Euclidean), `_S`."""
    half_squares_V = table_VD.square().sum(-1) / 2
    return torch.cat([(part_SD @ table_VD.T - half_squares_V).argmax(-1) for part_SD in points_SD.split(piece)])
