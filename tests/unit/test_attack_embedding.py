"""Attack (a) is exact where the cut is at block 0; attack (g) reads plain bytes as well, and nothing of sealed ones."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hpc.config import AdapterConfig, LinkConfig
from hpc.link.cipher import make_cipher
from hpc.link.frame import BODY_BYTES, PREFIX_BYTES
from hpc.model.build import ModelBuilder
from hpc.privacy.attacks.nearest_embedding import nearest, nearest_embedding
from hpc.privacy.attacks.public import PublicModel
from hpc.privacy.attacks.sealed_frames import sealed_frames
from hpc.privacy.recorded import Sealed
from hpc.privacy.seen import Seen
from tests.unit.attack_case import draw_rows, plain_hidden, public_model, seen_from

LENGTHS = (9, 14, 5)
# Scaled embeddings, learned positions, a projection, a norm behind the embedding.
FAMILIES = ("llama", "gemma3", "gpt2", "opt_projected", "bloom")


@pytest.mark.parametrize("family", FAMILIES)
def test_nearest_embedding_is_exact_at_cut_0(family: str, tmp_path: Path) -> None:
    public = public_model(family, 0, tmp_path)
    rows = draw_rows(public.vocabulary, LENGTHS)
    seen = seen_from(rows, plain_hidden(family, tmp_path, rows, block=0))
    assert nearest_embedding(seen, public) == [rows[:2], rows[2:]]


def test_nearest_embedding_is_exact_in_half_precision(tmp_path: Path) -> None:
    public = public_model("tiny-llama", 0, tmp_path, "bfloat16")
    rows = draw_rows(public.vocabulary, LENGTHS)
    with torch.no_grad():
        hidden = [public.head(torch.tensor([row]))[0] for row in rows]
    assert nearest_embedding(seen_from(rows, hidden), public) == [rows[:2], rows[2:]]


def test_prefixes_shift_learned_positions_for_the_attacker_too(tmp_path: Path) -> None:
    public = public_model("gpt2", 0, tmp_path)
    config = replace(public.config, adapter=AdapterConfig(method="p_tuning_v2", num_virtual_tokens=7))
    rows = draw_rows(public.vocabulary, LENGTHS)
    head = ModelBuilder.of(config).part("head")  # as the client has it
    with torch.no_grad():
        seen = seen_from(rows, [head(torch.tensor([row]))[0] for row in rows])
    assert nearest_embedding(seen, PublicModel.of(config)) == [rows[:2], rows[2:]]


def test_what_everybody_has_is_what_the_model_publishes(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    public = public_model("qwen3", 2, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3").eval()
    assert torch.equal(public.embedding_VD, plain.get_input_embeddings().weight.detach())
    assert public.embedding_VD.dtype == torch.float32
    assert not any("lora" in name for name, _ in public.head.named_parameters())
    assert not public.head.training
    row = draw_rows(public.vocabulary, (7,))
    torch.testing.assert_close(
        public.head(torch.tensor(row))[0].detach(), plain_hidden("qwen3", tmp_path, row, block=2)[0]
    )


def test_nearest_is_by_distance_also_where_a_longer_vector_has_the_greater_product() -> None:
    table_VD = torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]])
    rows_SD = torch.tensor([[2.0, 0.1], [9.0, 1.0], [0.1, 0.2]])
    assert nearest(rows_SD, table_VD).tolist() == [0, 1, 2]


def test_nearest_tells_apart_what_lies_close_and_far_out() -> None:
    """The expanded square loses the difference in float32: 4096^2 + 1e-2^2."""
    table_VD = torch.tensor([[4096.0, 0.0], [4096.0, 0.01], [4096.0, 0.02]])
    assert nearest(table_VD + torch.tensor([0.0, 0.002]), table_VD).tolist() == [0, 1, 2]


def sealed_as(seen: list[Seen], encrypted: bool) -> list[Sealed]:
    """The messages of frames with these payloads: header, payload and tags."""
    made = []
    for index, batch in enumerate(seen):
        payload = batch.smashed_SD.contiguous().numpy().tobytes()
        header = bytes(PREFIX_BYTES + BODY_BYTES)
        if encrypted:
            cipher = make_cipher("openssl", os.urandom(32))
            out = bytearray(len(payload) + cipher.overhead)
            cipher.seal_into(bytes(12), payload, b"", memoryview(out))
            header, payload = header + bytes(cipher.overhead), bytes(out)
        message = torch.frombuffer(bytearray(header + payload), dtype=torch.uint8)
        made.append(Sealed(step=index, micro=0, messages=(message,)))
    return made


@pytest.mark.parametrize("encrypted", [True, False])
def test_sealed_frames_say_nothing_and_plain_ones_everything(encrypted: bool, tmp_path: Path) -> None:
    public = public_model("llama", 0, tmp_path)
    link = LinkConfig(encryption="aes-256-gcm" if encrypted else "off")
    public = PublicModel(config=replace(public.config, link=link), embedding_VD=public.embedding_VD, head=public.head)
    rows = draw_rows(public.vocabulary, (400, 300, 300))
    with torch.no_grad():
        seen = seen_from(rows, [public.head(torch.tensor([row]))[0] for row in rows])
    guesses = [row for batch in sealed_frames(seen, sealed_as(seen, encrypted), public) for row in batch]
    assert [len(row) for row in guesses] == [len(row) for row in rows]
    hits = sum(a == b for guess, row in zip(guesses, rows, strict=True) for a, b in zip(guess, row, strict=True))
    if encrypted:  # by chance each of 1000 tokens has 1 in V; five standard deviations above that is never seen
        chance = 1 / public.vocabulary
        assert hits < 1000 * chance + 5 * math.sqrt(1000 * chance * (1 - chance))
    else:
        assert hits == 1000
