"""The paper's attack: an inverter that learns from a colluding client what text its activations stand for.

The colluder gives its text and the smashed activations of its own head; the inverter learns to name the token at each
position (SIP: Chen et al., 2024), and is then applied to another client's activations. The published code of FL-GLM
trains its decoder to name the next token instead, which is a guess about text to come: `target: next`, to compare.

Shape suffixes: B rows, T tokens, S valid tokens of all rows together, D hidden size of the model, V vocabulary, C
tokens that the loss compares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from hpc.errors import DataError
from hpc.privacy.attack_options import InverterOptions
from hpc.privacy.attacks.networks import Network, make_network
from hpc.privacy.seen import Sample, Seen
from hpc.ragged import pack, pad


def invert_by_learning(
    victim: Sequence[Seen],
    *,
    shadow: Sequence[Sample],
    embedding_VD: torch.Tensor,
    options: InverterOptions,
    seed: int = 0,
) -> list[list[list[int]]]:
    """Guesses for `victim` of an inverter trained on `shadow`, a colluding client's samples.

    Raises `DataError` if there are none.
    """
    if not any(sample.seen.lengths for sample in shadow):
        raise DataError("the inverter has nothing to learn from: a colluding client's recordings are needed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inverter = _train(shadow, embedding_VD, options)
    first = Counter(row[0] for sample in shadow for row in sample.truth.ids).most_common(1)[0][0]
    return [_guess(inverter, seen, options, first) for seen in victim]


def _train(shadow: Sequence[Sample], embedding_VD: torch.Tensor, options: InverterOptions) -> Network:
    rows = [
        (row_TD, torch.tensor(ids))
        for sample in shadow
        for row_TD, ids in zip(sample.seen.rows_TD(), sample.truth.ids, strict=True)
    ]
    network = make_network(torch.cat([row_TD for row_TD, _ in rows]), embedding_VD, options)
    optimiser = torch.optim.Adam(network.parameters(), lr=options.learning_rate)
    for _ in range(options.epochs):
        for batch in _batches([len(ids) for _, ids in rows], options.batch_tokens):
            optimiser.zero_grad()
            _loss(network, [rows[index] for index in batch], options).backward()
            optimiser.step()
    return network.eval()


def _batches(lengths: Sequence[int], most_tokens: int) -> list[list[int]]:
    """Rows in a fresh order, as many together as have no more than `most_tokens` tokens (or one)."""
    batches: list[list[int]] = []
    room = 0
    for row in torch.randperm(len(lengths)).tolist():
        if not batches or lengths[row] > room:
            batches.append([])
            room = most_tokens
        batches[-1].append(row)
        room -= lengths[row]
    return batches


def _loss(
    network: Network, rows: Sequence[tuple[torch.Tensor, torch.Tensor]], options: InverterOptions
) -> torch.Tensor:
    """Mean cross-entropy over valid tokens (nats); with target `next`, a row's last one has no answer."""
    lengths = [len(ids) for _, ids in rows]
    found_SD = pack(network(pad(torch.cat([row_TD for row_TD, _ in rows]), lengths), lengths), lengths)
    asked_S = torch.cat([ids for _, ids in rows])
    if options.target == "next":
        last_S = torch.cat([torch.arange(n) == n - 1 for n in lengths])
        found_SD, asked_S = found_SD[~last_S], asked_S.roll(-1)[~last_S]
    vocabulary = network.vocabulary
    if not 0 < options.negatives < vocabulary:
        return torch.nn.functional.cross_entropy(network.logits(found_SD), asked_S)
    compared_C = torch.cat([asked_S, torch.randint(vocabulary, (options.negatives,))]).unique()
    return torch.nn.functional.cross_entropy(
        network.logits(found_SD, compared_C), torch.searchsorted(compared_C, asked_S)
    )


@torch.no_grad()
def _guess(network: Network, seen: Seen, options: InverterOptions, first: int) -> list[list[int]]:
    """What the network names at each position; with target `next`, at the position before (and `first` at the first).

    So both targets are scored at the position that they mean.
    """
    lengths = list(seen.lengths)
    found_SD = pack(network(pad(seen.smashed_SD, lengths), lengths), lengths)
    ids_S = torch.cat([network.logits(piece_SD).argmax(-1) for piece_SD in found_SD.split(1024)])
    rows = [row.tolist() for row in ids_S.split(lengths)]
    return rows if options.target == "same" else [[first, *row[:-1]] for row in rows]
