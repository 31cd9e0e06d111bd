"""A server that returns gradients of its own making turns a client's head into one that it can read.

The client is the real one; the server's end of the link is `hpc.privacy.hostile_trunk`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc.client import Client
from hpc.data.dataset import load_client_data
from hpc.errors import DataError
from hpc.model.build import ModelBuilder
from hpc.model.pretrained import load_tokenizer
from hpc.privacy.attack_options import HijackOptions
from hpc.privacy.attacks.fsha import Hijacker
from hpc.privacy.hostile_trunk import plausible
from hpc.privacy.seen import Seen
from hpc.ragged import pack
from tests.unit.hijack_case import duel, own_text, settings
from tests.unit.learned_case import config, public

STEPS = 24
RUN = settings("lora", head_blocks=2, rate=1e-2, steps=STEPS)
OPTIONS = HijackOptions(hidden=64)


def hijacker() -> Hijacker:
    return Hijacker(own_text(RUN), embedding_VD=public(config(head_blocks=2)).embedding_VD, options=OPTIONS)


@torch.no_grad()
def read(by: Hijacker, client: Client) -> float:
    """Token accuracy of the server's inverse network on a batch of the client."""
    data = load_client_data(RUN, 0, load_tokenizer(ModelBuilder.of(RUN).resolver))
    batch = data.train_batch(STEPS)
    smashed_SD = pack(client.head.eval()(batch.ids_BT), batch.lengths)
    ids_S = pack(batch.ids_BT[..., None], batch.lengths)[:, 0]
    (rows,) = by.invert([Seen(client_id=0, step=0, lengths=batch.lengths, smashed_SD=smashed_SD)])
    return float((torch.tensor([token for row in rows for token in row]) == ids_S).float().mean())


def test_a_hijacked_head_is_read_far_better_than_an_honest_one(tmp_path: Path) -> None:
    by = hijacker()
    before = read(by, duel(RUN, tmp_path, None, 0).client)
    hijacked, trained = duel(RUN, tmp_path, by), duel(RUN, tmp_path, None)
    assert hijacked.suspected is None
    assert read(by, hijacked.client) > max(before, read(by, trained.client)) + 0.1


def test_what_it_returns_is_no_longer_than_what_came_and_nowhere_a_label_cannot_reach() -> None:
    sent_SD, own_SD = torch.zeros(7, 3), torch.randn(7, 3)
    sent_SD[1], sent_SD[4] = 2.0, 1.0  # rows of 3 and 4
    returned_SD = plausible(own_SD, sent_SD, (3, 4), careful=True)
    assert returned_SD.norm() == pytest.approx(float(sent_SD.norm()))
    assert returned_SD.abs().amax(-1).gt(0).tolist() == [True, True, False, True, True, False, False]
    assert plausible(own_SD, sent_SD, (3, 4), careful=False).abs().amax(-1).gt(0).all()


def test_without_text_of_its_own_it_says_what_is_missing() -> None:
    with pytest.raises(DataError, match="shadow rows"):
        Hijacker([], embedding_VD=torch.randn(5, 4), options=OPTIONS)
