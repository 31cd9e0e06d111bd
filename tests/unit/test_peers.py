"""Clients hand over through a server that can neither read, replace, alter nor repeat what it carries."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hpc.errors import HpcError, IdentityError, ReplayError, TamperError
from hpc.link.identity import Authorised, client_name, load_private
from hpc.link.peers import PeerKeys, SignedEphemeral

TENSORS = {
    "lora_A": torch.randn(8, 16),
    "bf16": torch.ones(3, dtype=torch.bfloat16),
    "step": torch.tensor(7),
    "empty": torch.zeros(0, 4),
}


def keys(folder: Path, client_id: int, run_id: str = "run", *, seed: bytes = b"") -> PeerKeys:
    """`seed`: what the X25519 key is made of; random by default."""
    own, pinned = load_private(folder, client_name(client_id)), Authorised.load(folder).by_client_id()
    return PeerKeys(client_id, own, pinned, run_id, random_bytes=lambda size: seed[:size] or os.urandom(size))


@pytest.fixture
def trio(pristine_keys: Path) -> list[PeerKeys]:
    trio = [keys(pristine_keys, client_id) for client_id in range(3)]
    for one in trio:
        for other in trio:
            if one is not other:
                one.add(other.public_message())
    return trio


def test_hand_over_to_the_bit_both_ways_and_again(trio: list[PeerKeys]) -> None:
    for frm, to in [(0, 1), (1, 0), (0, 1), (1, 2), (0, 2)]:
        opened = trio[to].open(frm, trio[frm].seal(to, TENSORS))
        assert opened.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert opened[name].dtype == tensor.dtype
            assert torch.equal(opened[name], tensor)


def test_shared_transposed_and_learning_tensors_can_be_sealed(trio: list[PeerKeys]) -> None:
    whole = torch.arange(6.0).requires_grad_()
    opened = trio[1].open(0, trio[0].seal(1, {"a": whole[:3], "b": whole, "t": whole.view(2, 3).t()}))
    assert torch.equal(opened["t"], whole.view(2, 3).t())


def test_sealed_bytes_show_neither_names_nor_values(trio: list[PeerKeys]) -> None:
    sealed = bytes(trio[0].seal(1, {"lora_A": torch.zeros(1000)}).numpy())
    assert b"lora_A" not in sealed
    assert bytes(16) not in sealed


def test_replayed_and_skipped_hand_overs_are_refused(trio: list[PeerKeys]) -> None:
    first, second = trio[0].seal(1, TENSORS), trio[0].seal(1, TENSORS)
    with pytest.raises(ReplayError, match="hand-over 1 of client-0 came where 0 was due"):
        trio[1].open(0, second)
    trio[1].open(0, first)
    with pytest.raises(ReplayError, match="hand-over 0 of client-0 came where 1 was due"):
        trio[1].open(0, first)
    trio[1].open(0, second)


@pytest.mark.parametrize("position", [8, 100, -1])
def test_altered_hand_over_is_refused_and_the_right_one_still_opens(trio: list[PeerKeys], position: int) -> None:
    sealed = trio[0].seal(1, TENSORS)
    altered = sealed.clone()
    altered[position] ^= 1
    with pytest.raises(TamperError, match="hand-over 0 of client-0"):
        trio[1].open(0, altered)
    trio[1].open(0, sealed)


def test_truncated_hand_over_is_refused(trio: list[PeerKeys]) -> None:
    sealed = trio[0].seal(1, TENSORS)
    for size in (0, 10, 23, len(sealed) - 1):
        with pytest.raises(TamperError):
            trio[1].open(0, sealed[:size])


def test_only_the_addressee_opens_and_only_as_from_the_sender(trio: list[PeerKeys]) -> None:
    sealed = trio[0].seal(1, TENSORS)
    with pytest.raises(TamperError):
        trio[2].open(0, sealed)
    with pytest.raises(TamperError):
        trio[1].open(2, sealed)
    with pytest.raises(TamperError):
        trio[0].open(1, sealed)


def test_server_cannot_put_its_own_key_in(pristine_keys: Path) -> None:
    forger = PeerKeys(1, load_private(pristine_keys, "server"), {}, "run")
    victim = keys(pristine_keys, 0)
    with pytest.raises(IdentityError, match="signature of client-1 does not fit"):
        victim.add(forger.public_message())
    with pytest.raises(IdentityError, match="client-1 has not given its key to client-0"):
        victim.seal(1, TENSORS)


def test_key_of_another_run_client_or_content_is_refused(pristine_keys: Path) -> None:
    victim = keys(pristine_keys, 0)
    with pytest.raises(IdentityError, match="another run"):
        victim.add(keys(pristine_keys, 1, run_id="yesterday").public_message())
    with pytest.raises(IdentityError, match="itself"):
        victim.add(victim.public_message())
    swapped = SignedEphemeral.from_bytes(keys(pristine_keys, 1).public_message())
    swapped.client_id = 2
    with pytest.raises(IdentityError, match="client-2"):
        victim.add(swapped.to_bytes())
    for junk in (b"", b"{}", b"[1]", b"\xff" * 10, b"[" * 9000, b'{"client_id":true}'):
        with pytest.raises(IdentityError):
            victim.add(junk)


def test_unpinned_client_is_refused(pristine_keys: Path) -> None:
    victim = PeerKeys(0, load_private(pristine_keys, "client-0"), {}, "run")
    with pytest.raises(IdentityError, match="no key of client-1 is pinned"):
        victim.add(keys(pristine_keys, 1).public_message())


def test_client_that_came_back_has_new_keys_and_its_old_one_is_refused(pristine_keys: Path) -> None:
    here, before, after = keys(pristine_keys, 0), keys(pristine_keys, 1), keys(pristine_keys, 1)
    for one in (before, after):
        one.add(here.public_message())
        here.add(one.public_message())
    sealed = before.seal(0, TENSORS)
    with pytest.raises(HpcError):
        here.open(1, sealed)
    assert here.open(1, after.seal(0, TENSORS)).keys() == TENSORS.keys()
    here.add(after.public_message())  # the same key again begins nothing anew
    with pytest.raises(ReplayError, match="hand-over 0"):
        here.open(1, keys_message_replay(after))
    with pytest.raises(ReplayError, match="an earlier key of client-1"):
        here.add(before.public_message())


def test_pair_secret_is_the_same_at_both_and_another_for_everything_else(trio: list[PeerKeys]) -> None:
    secret = trio[0].pair_secret(1, "masks")
    assert len(secret) == 32
    assert secret == trio[1].pair_secret(0, "masks") == trio[0].pair_secret(1, "masks")
    others = [trio[0].pair_secret(1, "mask"), trio[0].pair_secret(2, "masks"), trio[1].pair_secret(2, "masks")]
    assert len({secret, *others}) == 4


def test_pair_secret_is_bound_to_the_run(pristine_keys: Path) -> None:
    def pair_secret(run_id: str) -> bytes:
        """With the same X25519 keys in every run, so that only the run differs."""
        pair = [keys(pristine_keys, client_id, run_id, seed=bytes([client_id + 1]) * 32) for client_id in range(2)]
        pair[0].add(pair[1].public_message())
        return pair[0].pair_secret(1, "masks")

    assert pair_secret("run") == pair_secret("run")
    assert pair_secret("run") != pair_secret("another")


def test_pair_secret_without_its_key_names_the_client(pristine_keys: Path) -> None:
    with pytest.raises(IdentityError, match="masks missing in a secure round: client-1 has not given its key to clie"):
        keys(pristine_keys, 0).pair_secret(1, "masks")


def test_what_is_for_one_use_is_refused_the_second_time(trio: list[PeerKeys]) -> None:
    trio[0].use_once("mask of round 1")
    trio[0].use_once("mask of round 2")
    trio[1].use_once("mask of round 1")
    with pytest.raises(ReplayError, match="client-0 used the mask of round 1 before"):
        trio[0].use_once("mask of round 1")


def keys_message_replay(peer: PeerKeys) -> torch.Tensor:
    """A message with the counter of one that was already opened."""
    sealed = peer.seal(0, TENSORS)
    sealed[:8] = 0
    return sealed
