"""The server gets the sum and nothing else: bounds, lost clients, dishonest servers, and masks made independently."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from Crypto.Cipher import AES
from Crypto.PublicKey import RSA
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc.errors import HpcError, IdentityError, NonFinite, ProtocolError, ReplayError, TamperError
from hpc.link.identity import Identity, client_name
from hpc.link.masked_sum import ServerSum, relay_tags
from hpc.link.masks import (
    ClientMasks,
    add_mask,
    decode_fixed,
    encode_fixed,
    pack_tags,
    unpack_tags,
)
from hpc.link.peers import PeerKeys

CLIENTS = 8
ROUNDS = itertools.count(1)  # the keys are shared by all tests here, and no round comes twice under the same keys
FEW = settings(max_examples=25, deadline=None)


def small_rsa() -> RSA.RsaKey:
    """Too short for `hpc.link.identity`, which reads files; made in milliseconds."""
    pem = rsa.generate_private_key(65537, 1024).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return RSA.import_key(pem)


RSA_KEYS = [small_rsa() for _ in range(CLIENTS)]


def stream(label: str) -> Callable[[int], bytes]:
    """Reproducible bytes instead of random ones."""
    counter = itertools.count()
    return lambda size: hashlib.shake_256(f"{label} {next(counter)}".encode()).digest(size)


def acquainted(clients: int, label: str) -> list[PeerKeys]:
    """Keys of clients 0, 1, ... that have each other's."""
    pinned = {client: key.public_key() for client, key in enumerate(RSA_KEYS)}
    everyone = [
        PeerKeys(
            client,
            Identity(name=client_name(client), key=RSA_KEYS[client]),
            pinned,
            "run",
            random_bytes=stream(f"{label} {client}"),
        )
        for client in range(clients)
    ]
    for one, other in itertools.permutations(everyone, 2):
        one.add(other.public_message())
    return everyone


KEYS = acquainted(CLIENTS, "shared")


def begin(cohort: Iterable[int], keys: Sequence[PeerKeys] = KEYS, number: int | None = None) -> dict[int, ClientMasks]:
    """A new round's masks of each client."""
    cohort, number = list(cohort), next(ROUNDS) if number is None else number
    return {
        client: ClientMasks(
            keys[client],
            client_id=client,
            cohort=cohort,
            round_number=number,
            random_bytes=stream(f"own {number} {client}"),
        )
        for client in cohort
    }


def exchange(masks: dict[int, ClientMasks], survivors: Sequence[int]) -> dict[int, torch.Tensor]:
    """Steps 2 to 4 with an honest server, over the wire forms; what the survivors reveal."""
    sent = {client: pack_tags(masks[client].attest(survivors)) for client in survivors}
    relayed = relay_tags(survivors, sent)
    assert all(rows.shape == (len(survivors) - 1, 32) and rows.dtype == torch.uint8 for rows in relayed.values())
    return {
        client: masks[client].reveal(survivors, unpack_tags(relayed[client], survivors, but=client))
        for client in survivors
    }


def vectors(clients: Iterable[int], *, size: int = 37, scale: float = 1.0, seed: int = 0) -> dict[int, torch.Tensor]:
    """float32 at even ids, float64 at odd ones."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = (torch.float32, torch.float64)
    return {
        client: (scale * torch.randn(size, generator=generator, dtype=torch.float64)).to(dtypes[client % 2])
        for client in clients
    }


def assert_is_sum(total: torch.Tensor, summands: Iterable[torch.Tensor]) -> None:
    """Against exact rationals, within clients * 2**-41 and float64's own rounding."""
    columns = list(zip(*(summand.tolist() for summand in summands), strict=True))
    assert total.dtype == torch.float64
    assert total.shape == (len(columns),)
    for found, column in zip(total.tolist(), columns, strict=True):
        exact = sum(map(Fraction, column), Fraction(0))
        assert abs(Fraction(found) - exact) <= Fraction(len(column), 2**41) + abs(exact) * Fraction(1, 2**53)


def words(seed: bytes, size: int) -> list[int]:
    """The PRG once more, by PyCryptodome and Python's integers."""
    keystream = AES.new(seed, AES.MODE_CTR, nonce=b"", initial_value=0).encrypt(bytes(8 * size))
    return [int.from_bytes(keystream[at : at + 8], "little") for at in range(0, 8 * size, 8)]


def signed(word: int) -> int:
    return (word + 2**63) % 2**64 - 2**63


def plus(*terms: list[int]) -> torch.Tensor:
    """Sum mod 2**64 of whole vectors, by Python's integers."""
    return torch.tensor([signed(sum(column)) for column in zip(*terms, strict=True)], dtype=torch.int64)


def minus(term: list[int]) -> list[int]:
    return [-word for word in term]


# Sums


@pytest.mark.parametrize("clients", [2, 3, 5, 8])
@FEW
@given(st.integers(0, 2**32), st.sampled_from([1e-9, 1e-3, 1.0, 1e4]))
def test_the_sum_is_the_sum(clients: int, seed: int, scale: float) -> None:
    masks, x = begin(range(clients)), vectors(range(clients), scale=scale, seed=seed)
    server = ServerSum(range(clients), 1)
    for client in masks:
        server.add(client, masks[client].mask(x[client]))
    assert server.missing() == ()
    assert_is_sum(server.unmask(exchange(masks, server.survivors())), x.values())


@st.composite
def majorities(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A cohort of any ids, and survivors enough of it."""
    cohort = draw(st.lists(st.integers(0, CLIENTS - 1), min_size=2, max_size=CLIENTS, unique=True))
    least = max(2, len(cohort) // 2 + 1)
    survivors = draw(st.lists(st.sampled_from(cohort), min_size=least, max_size=len(cohort), unique=True))
    return cohort, survivors


@FEW
@given(majorities())
def test_lost_clients_leave_the_sum_of_the_others(case: tuple[list[int], list[int]]) -> None:
    cohort, came = case
    masks, x = begin(cohort), vectors(cohort)
    server = ServerSum(cohort, 1)
    for client in came:
        server.add(client, masks[client].mask(x[client]))
    assert server.survivors() == tuple(sorted(came))
    assert server.missing() == tuple(sorted({*cohort} - {*came}))
    revealed = exchange(masks, server.survivors())
    assert all(rows.shape == (1 + len(cohort) - len(came), 32) for rows in revealed.values())
    assert_is_sum(server.unmask(revealed), [x[client] for client in came])


@FEW
@given(majorities(), st.integers(1, 4))
def test_parts_of_several_ranks_add_up_to_the_same_bits(case: tuple[list[int], list[int]], ranks: int) -> None:
    cohort, came = case
    masks, x = begin(cohort), vectors(cohort)
    one, parts = ServerSum(cohort, 1), [ServerSum(cohort, 1, size=37) for _ in range(ranks)]
    for client in came:
        y = masks[client].mask(x[client])
        one.add(client, y)
        parts[client % ranks].add(client, y)
    survivors = one.survivors()
    revealed = exchange(masks, survivors)
    total = torch.zeros(37, dtype=torch.int64)
    for rank, part in enumerate(parts):
        total += part.unmask_partial(survivors, {c: rows for c, rows in revealed.items() if c % ranks == rank})
    assert torch.equal(total, one.unmask_partial(survivors, revealed))
    assert torch.equal(decode_fixed(total), one.unmask(revealed))


def test_sums_at_the_edges_of_the_range_and_an_empty_vector() -> None:
    edge = 2.0**23 / 3 - 1
    for values in ([edge, -edge, 0.0, -0.0, 2.0**-41, 5e-324], []):
        masks, server = begin(range(3)), ServerSum(range(3), 1)
        x = torch.tensor(values, dtype=torch.float64)
        for client in masks:
            server.add(client, masks[client].mask(x))
        assert_is_sum(server.unmask(exchange(masks, server.survivors())), [x] * 3)


# Fixed point


@given(st.lists(st.floats(-(2.0**20), 2.0**20), min_size=1, max_size=8))
def test_fixed_point_is_the_nearest(values: list[float]) -> None:
    encoded = encode_fixed(torch.tensor(values, dtype=torch.float64), clients=4)
    assert encoded.tolist() == [round(Fraction(value) * 2**40) for value in values]  # half to even, as torch's


@pytest.mark.parametrize("clients", [2, 3, 8])
def test_values_too_large_for_the_sum_are_refused_without_being_quoted(clients: int) -> None:
    limit = torch.tensor(2.0**23 / clients, dtype=torch.float64)
    for value in (limit, -limit, limit * 1.001, torch.tensor(1e300, dtype=torch.float64)):
        with pytest.raises(ProtocolError, match=f"over {clients} clients has elements of .* or more") as caught:
            encode_fixed(torch.stack([torch.zeros_like(limit), value * (1 + 2**-52)]), clients=clients)
        assert str(float(limit * 1.001)) not in str(caught.value)
    below = encode_fixed(torch.stack([limit * (1 - 2**-51), -limit * (1 - 2**-51)]), clients=clients)
    assert below.abs().max().item() * clients < 2**63


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    masks = begin(range(2))[0]
    with pytest.raises(NonFinite, match="NaN or infinite"):
        masks.mask(torch.tensor([0.0, value], dtype=dtype))
    masks.mask(torch.zeros(2, dtype=dtype))  # nothing was spent


@pytest.mark.parametrize("x", [torch.zeros(2, 2), torch.zeros(()), torch.zeros(2).half(), torch.zeros(2).long()])
def test_other_shapes_and_dtypes_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ProtocolError, match=r"float32 or float64 \[N\] was due"):
        encode_fixed(x, clients=2)


# Masks


@pytest.mark.parametrize("size", [0, 1, 7, 2**17, 2**17 + 3, 2**18 + 1])  # 2**17 words are made at a time
@pytest.mark.parametrize("sign", [1, -1])
def test_the_prg_is_that_of_another_library_and_wraps(size: int, sign: int) -> None:
    seed = stream("prg")(32)
    edges = torch.tensor([2**63 - 1, -(2**63), 0], dtype=torch.int64).repeat(size // 3 + 1)[:size]
    total, mask = edges.clone(), words(seed, size)
    add_mask(total, seed, sign)
    assert torch.equal(total, plus(edges.tolist(), mask if sign == 1 else minus(mask)))
    add_mask(total, seed, -sign)
    assert torch.equal(total, edges)


class KnownSecrets:
    """In the place of PeerKeys: pair secrets that a test can make as well."""

    def __init__(self, client: int) -> None:
        self.client = client

    def pair_secret(self, other: int, purpose: str) -> bytes:
        return hashlib.sha256(f"{sorted((self.client, other))} {purpose}".encode()).digest()

    def use_once(self, purpose: str) -> None:
        pass


def test_a_masked_vector_is_the_formula_of_the_paper() -> None:
    keys: Any = KnownSecrets(4)
    own = b"b" * 32
    masks = ClientMasks(keys, client_id=4, cohort=[7, 1, 4, 6], round_number=9, random_bytes=lambda size: own[:size])
    x = vectors([0])[0]
    seeds = {other: keys.pair_secret(other, "mask of round 9 over (1, 4, 6, 7)") for other in (1, 6, 7)}
    pairs = [minus(words(seeds[1], 37)), words(seeds[6], 37), words(seeds[7], 37)]
    assert torch.equal(masks.mask(x), plus(encode_fixed(x, clients=4).tolist(), words(own, 37), *pairs))


def test_what_the_server_has_before_the_reveal_looks_random() -> None:
    keys = acquainted(5, "fixed")
    x = torch.zeros(20_000)  # the worst case
    first, again = ({c: m.mask(x) for c, m in begin(range(5), keys, number).items()} for number in (1, 2))
    fixed = encode_fixed(x, clients=5)
    for y in (*first.values(), torch.stack(list(first.values())).sum(0), *(first[c] - again[c] for c in first)):
        assert not (y == fixed).any()
        counts = torch.bincount(y.view(torch.uint8).long(), minlength=256).double()
        expected = counts.sum() / 256
        assert 165 < ((counts - expected) ** 2 / expected).sum() < 370  # chi-square, 255 degrees: four to five sigma
    assert all(not (a == b).any() for a, b in itertools.combinations([*first.values(), *again.values()], 2))


def test_without_one_survivors_seeds_the_sum_stays_masked() -> None:
    masks, x = begin(range(4)), vectors(range(4))
    server = ServerSum(range(4), 1)
    for client in range(3):
        server.add(client, masks[client].mask(x[client]))
    revealed = exchange(masks, (0, 1, 2))
    true = server.unmask(revealed)
    for client, row in itertools.product(range(3), range(2)):
        guess = {c: rows.clone() for c, rows in revealed.items()}
        guess[client][row] = 0
        assert not (server.unmask(guess) == true).any()


def test_the_same_randomness_gives_the_same_bits() -> None:
    def one_round() -> list[torch.Tensor]:
        masks = begin(range(3), acquainted(3, "again"), number=5)
        y = [masks[client].mask(vectors([client])[client]) for client in (0, 1)]
        return [*y, *exchange(masks, (0, 1)).values()]

    assert all(torch.equal(one, other) for one, other in zip(one_round(), one_round(), strict=True))


def test_seeds_of_a_lost_client_are_of_no_use_in_the_next_round() -> None:
    keys, x = acquainted(4, "rounds"), vectors(range(4))
    this, after = begin(range(4), keys, 1), begin(range(4), keys, 2)
    y_lost = after[3].mask(x[3])
    for client in range(3):
        this[client].mask(x[client])
        after[client].mask(x[client])
    revealed, own = exchange(this, (0, 1, 2)), exchange(after, (0, 1, 2, 3))[3]
    pairs_of_after = exchange(begin_again(4), (0, 1, 2))
    for client in range(3):
        assert not torch.equal(revealed[client], pairs_of_after[client])
    with_old, with_new = y_lost.clone(), y_lost.clone()
    for total, seeds in ((with_old, revealed), (with_new, pairs_of_after)):
        add_mask(total, own[0].numpy().tobytes(), -1)
        for client in range(3):
            add_mask(total, seeds[client][1].numpy().tobytes(), +1)  # client 3 is above: it took these masks off
    fixed = encode_fixed(x[3], clients=4)
    assert torch.equal(with_new, fixed)  # what such a server would have got with the round's own seeds
    assert not (with_old == fixed).any()


def begin_again(clients: int) -> dict[int, ClientMasks]:
    """Round 2 under the keys of the test above, as if they had served only for that; masked."""
    masks = begin(range(clients), acquainted(clients, "rounds"), 2)
    for client in range(clients):
        masks[client].mask(vectors(range(clients))[client])
    return masks


# Clients that refuse


def masked(cohort: Iterable[int]) -> dict[int, ClientMasks]:
    """A new round in which everyone has masked."""
    masks = begin(cohort)
    for each in masks.values():
        each.mask(torch.ones(4))
    return masks


def test_a_server_that_tells_different_rosters_gets_one_half_only() -> None:
    masks = masked(range(5))
    with_4, without_4 = (0, 1, 2, 3, 4), (0, 1, 2, 3)
    tags = {client: masks[client].attest(without_4) for client in without_4}
    masks[4].attest(with_4)
    with pytest.raises(TamperError, match=r"client-0 does not attest that the survivors are \(0, 1, 2, 3, 4\)"):
        masks[4].reveal(with_4, {client: tags[client][(client + 1) % 4] for client in without_4})
    for client in without_4:  # these do give s_4, but b_4 stays with client 4
        masks[client].reveal(without_4, {other: tags[other][client] for other in without_4 if other != client})
        with pytest.raises(ProtocolError, match=r"the server named .*4\) .* and before that \(0, 1, 2, 3\)"):
            masks[client].attest(with_4)
    with pytest.raises(ProtocolError, match="client-4 is not among"):
        masks[4].attest(without_4)


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_client_that_was_told_another_roster_stops_everyone_of_its_roster(odd: int) -> None:
    masks = masked(range(4))
    tags = {client: masks[client].attest((0, 1, 2, 3) if client == odd else (0, 1, 2)) for client in range(3)}
    for client in range(3):
        roster = (0, 1, 2, 3) if client == odd else (0, 1, 2)
        with pytest.raises(TamperError):
            masks[client].reveal(roster, {other: tags[other][client] for other in range(3) if other != client})


def test_clients_told_different_cohorts_are_stopped() -> None:
    number = next(ROUNDS)
    masks = begin(range(4), number=number) | {0: begin(range(3), number=number)[0]}
    for each in masks.values():
        each.mask(torch.ones(4))
    tags = {client: masks[client].attest((0, 1, 2)) for client in range(3)}
    with pytest.raises(TamperError, match="client-0"):
        masks[1].reveal((0, 1, 2), {other: tags[other][1] for other in (0, 2)})


def test_missing_forged_reflected_and_foreign_tags_are_refused_by_name() -> None:
    masks, earlier = masked(range(3)), masked(range(3))
    old = {client: each.attest((0, 1, 2)) for client, each in earlier.items()}
    tags = {client: each.attest((0, 1, 2)) for client, each in masks.items()}
    right = {1: tags[1][0], 2: tags[2][0]}
    flipped = bytes([right[2][0] ^ 1]) + right[2][1:]
    for wrong in (flipped, bytes(32), b"", right[2][:31], tags[0][2], tags[2][1], right[1], old[2][0]):
        with pytest.raises(TamperError, match="client-2 does not attest"):
            masks[0].reveal((0, 1, 2), right | {2: wrong})
    with pytest.raises(TamperError, match="client-1 does not attest"):
        masks[0].reveal((0, 1, 2), {2: right[2]})
    assert masks[0].reveal((0, 1, 2), right).shape == (1, 32)


@pytest.mark.parametrize(
    ("survivors", "message"),
    [
        ((0,), "1 of 5"),
        ((0, 1), "2 of 5"),
        ((), "0 of 5"),
        ((0, 1, 2, 7), "ascending ids of the cohort"),
        ((0, 2, 1), "ascending ids of the cohort"),
        ((0, 1, 1, 2), "ascending ids of the cohort"),
        ((0, 1, 2.0), "ascending ids of the cohort"),
        ((False, True, 2), "ascending ids of the cohort"),
        ((1, 2, 3, 4), "client-0 is not among"),
    ],
)
def test_rosters_that_break_a_rule_are_refused(survivors: tuple[int, ...], message: str) -> None:
    masks = masked(range(5))
    with pytest.raises(ProtocolError, match=message):
        masks[0].attest(survivors)
    masks[0].attest((0, 1, 2))  # nothing was attested before


@pytest.mark.parametrize(("cohort", "least"), [(2, 2), (3, 2), (4, 3), (5, 3), (8, 5)])
def test_more_than_half_must_be_left(cohort: int, least: int) -> None:
    masks = masked(range(cohort))
    with pytest.raises(ProtocolError, match="more than half and at least 2"):
        masks[0].attest(range(least - 1))
    assert len(masks[0].attest(range(least))) == least - 1


def test_the_order_of_a_round_is_kept() -> None:
    masks = begin(range(2))
    with pytest.raises(ProtocolError, match="before this client sent"):
        masks[0].attest((0, 1))
    for each in masks.values():
        each.mask(torch.ones(2))
    tags = masks[1].attest((0, 1))
    with pytest.raises(ProtocolError, match="after attesting none"):
        masks[0].reveal((0, 1), {1: tags[0]})
    with pytest.raises(ProtocolError, match="after attesting none"):
        masks[0].reveal((), {})
    masks[0].attest((0, 1))
    with pytest.raises(ProtocolError, match="asked to reveal"):
        masks[0].reveal((0,), {})
    with pytest.raises(ProtocolError, match="masked already"):
        masks[0].mask(torch.ones(2))


def test_a_round_does_not_come_twice_under_the_same_keys() -> None:
    number = next(ROUNDS)
    begin(range(3), number=number)[0].mask(torch.ones(2))
    with pytest.raises(ReplayError, match=f"client-0 used the mask of round {number} before"):
        begin(range(2), number=number)[0].mask(torch.ones(2))


def test_a_key_that_never_came_is_named() -> None:
    with pytest.raises(IdentityError, match="masks missing in a secure round: client-2 has not given its key"):
        ClientMasks(acquainted(2, "two")[0], client_id=0, cohort=range(3), round_number=1)


@pytest.mark.parametrize("cohort", [[0], [], [0, 1, 1], [1, 2], [0, 1.0]])
def test_cohorts_that_are_none_are_refused(cohort: list[int]) -> None:
    with pytest.raises(ProtocolError, match="cohort"):
        ClientMasks(KEYS[0], client_id=0, cohort=cohort, round_number=1)


def test_seeds_are_in_no_repr_and_no_message() -> None:
    masks = masked(range(3))
    tags = {client: each.attest((0, 1)) for client, each in masks.items() if client < 2}
    seeds = [bytes(row) for row in masks[0].reveal((0, 1), {1: tags[1][0]}).numpy()]
    shown = [repr(masks[0]), repr(KEYS[0])]
    for tag in (b"", bytes(32)):
        with pytest.raises(HpcError) as caught:
            masks[1].reveal((0, 1), {0: tag})
        shown.append(str(caught.value))
    for secret in (*seeds, tags[0][1]):
        assert not any(secret.hex() in text or repr(secret)[2:-1] in text for text in shown)


# The server


def test_the_server_refuses_vectors_that_do_not_belong() -> None:
    server = ServerSum(range(3), 6)
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ProtocolError, match=r"int64 \[4\] was due"):
        server.add(0, y.view(2, 2))
    server.add(0, y)
    for client, wrong, message in (
        (0, y, "round 6: client-0 sent a second vector"),
        (3, y, "client-3 is not in the cohort"),
        (1, y[:3], r"client-1 sent int64 \[3\]; int64 \[4\] was due"),
        (1, y.double(), r"client-1 sent float64 \[4\]"),
    ):
        with pytest.raises(ProtocolError, match=message):
            server.add(client, wrong)
    assert server.survivors() == (0,)
    assert not y.any()


def test_adding_leaves_the_clients_tensors_alone() -> None:
    server, y = ServerSum(range(2), 1), torch.ones(4, dtype=torch.int64)
    for client in range(2):
        server.add(client, y)
    assert torch.equal(y, torch.ones(4, dtype=torch.int64))


def test_the_server_refuses_seeds_that_do_not_belong() -> None:
    server, rows = ServerSum(range(3), 1), torch.zeros(2, 32, dtype=torch.uint8)
    server.add(0, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ProtocolError, match="1 of 3"):
        server.unmask({0: rows})
    server.add(1, torch.zeros(4, dtype=torch.int64))
    for revealed in ({0: rows}, {0: rows, 1: rows, 2: rows}, {}):
        with pytest.raises(ProtocolError, match="vectors came from"):
            server.unmask(revealed)
    for wrong in (rows[:1], rows[:, :31], rows.to(torch.int8), rows.view(-1)):
        with pytest.raises(ProtocolError, match=r"the seeds of client-1 came as .*; uint8 \[2, 32\] was due"):
            server.unmask({0: rows, 1: wrong})
    with pytest.raises(ProtocolError, match="vectors came from"):
        server.unmask_partial((0, 2), {0: rows, 1: rows})
    with pytest.raises(ProtocolError, match="length was not given"):
        ServerSum(range(3), 1).unmask_partial((0, 1), {})


def test_tags_are_relayed_and_checked() -> None:
    survivors = (1, 4, 6)
    tags = {frm: {to: bytes([16 * frm + to]) * 32 for to in survivors if to != frm} for frm in survivors}
    sent = {frm: pack_tags(tags[frm]) for frm in survivors}
    relayed = relay_tags(survivors, sent)
    for to in survivors:
        assert unpack_tags(relayed[to], survivors, but=to) == {frm: tags[frm][to] for frm in survivors if frm != to}
    for wrong in (sent[4][:1], sent[4].float(), sent[4][:, 1:]):
        with pytest.raises(ProtocolError, match=r"client-4 came as .*; uint8 \[2, 32\] was due"):
            relay_tags(survivors, sent | {4: wrong})
    with pytest.raises(ProtocolError, match="tags came from"):
        relay_tags(survivors, {1: sent[1], 4: sent[4]})
