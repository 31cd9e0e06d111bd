"""Secure aggregation: the server learns the sum of the clients' vectors, and nothing else of any of them.

After Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, without its
secret sharing: whoever got its vector through must stay until the masks come off. A round over a cohort U:

1. client i → server, int64 [N]: y_i = fixed(x_i) + PRG(b_i) + sum_{j>i} PRG(s_ij) - sum_{j<i} PRG(s_ij)  mod 2**64
2. server → clients: the survivors V, those whose y came
3. each of V → server → each other of V, uint8 [|V| - 1, 32]: tags, which attest that this client was told V
4. each of V → server, uint8 [1 + |U| - |V|, 32]: b_i, and s_id of each lost d; only if all of V attest the same V

b_i is fresh, s_ij is derived from the pair's X25519 secret for this run, cohort and round. To lay x_d open a server
needs b_d, which d gives as a survivor, and all s_id, which others give if d is lost. As a client attests one roster in
a round, and honest members of a roster give seeds for this one only, it gets one or the other. With c clients at its
side it still gets no sum over fewer than |V| - c others. Nobody can tell whether a client sends wrong numbers.

Suffix: N elements of a vector.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterable, Mapping, Sequence

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from hpc.errors import NonFinite, ProtocolError, TamperError
from hpc.link.identity import client_name
from hpc.link.key_exchange import SECRET_BYTES, RandomBytes
from hpc.link.peers import PeerKeys

FRACTION_BITS = 40
_ZEROS = bytes(2**20)  # keystream is made a MiB at a time, to stay in the processor's cache


def encode_fixed(x_N: torch.Tensor, *, clients: int) -> torch.Tensor:
    """float32 or float64 → int64 on the CPU: the integers nearest to x * 2**40, fit to be summed over `clients`.

    A decoded sum is off by at most clients * 2**-41, and from 2**13 on by float64's own rounding as well.
    Raises NonFinite, and ProtocolError for another shape or dtype or unless |x| * 2**40 * clients < 2**63.
    """
    if x_N.dtype not in (torch.float32, torch.float64) or x_N.ndim != 1:
        raise ProtocolError(f"a vector to be masked is {shown(x_N)}; float32 or float64 [N] was due")
    # No message here quotes an element: the reason why a client ends travels to the server.
    if not x_N.isfinite().all():
        raise NonFinite(
            "a vector to be summed over the clients has NaN or infinite elements; lower --train.learning_rate"
        )
    scaled_N = torch.round(x_N.detach().to("cpu", torch.float64) * 2.0**FRACTION_BITS)
    if scaled_N.numel() and float(scaled_N.abs().max()) * clients >= 2.0**63:
        limit = 2.0 ** (63 - FRACTION_BITS) / clients
        raise ProtocolError(
            f"a vector to be summed over {clients} clients has elements of {limit:g} or more, which fixed point "
            f"with {FRACTION_BITS} fraction bits does not hold; lower --train.learning_rate"
        )
    return scaled_N.to(torch.int64)


def fits_fixed(x_N: torch.Tensor, *, clients: int) -> bool:
    """Whether `encode_fixed` can hold it."""
    return bool((x_N.abs() < 2.0 ** (63 - FRACTION_BITS) / clients).all())  # not-a-number is below nothing


def noise(size: int) -> torch.Tensor:
    """int64 [size], uniform: says nothing about anything."""
    return torch.frombuffer(bytearray(os.urandom(8 * size)), dtype=torch.int64)


def decode_fixed(total_N: torch.Tensor) -> torch.Tensor:
    """int64, a sum mod 2**64 of what `encode_fixed` gave → float64."""
    return total_N.to(torch.float64) / 2.0**FRACTION_BITS


def add_mask(total_N: torch.Tensor, seed: bytes, sign: int) -> None:
    """Add sign * PRG(seed) to an int64 vector in place, mod 2**64.

    The PRG is AES-256-CTR's keystream (NIST SP 800-38A) as little-endian words. A seed makes one vector, as long as
    it is needed, so every seed's counter may start at zero.
    """
    encryptor = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    buffer = bytearray(len(_ZEROS))
    words = torch.frombuffer(buffer, dtype=torch.int64)
    for part_N in total_N.split(len(words)):
        encryptor.update_into(_ZEROS[: 8 * len(part_N)], buffer)
        part_N.add_(words[: len(part_N)], alpha=sign)


class ClientMasks:
    """One client's side of one round. `mask`, `attest`, `reveal`, in this order."""

    def __init__(
        self,
        keys: PeerKeys,
        *,
        client_id: int,
        cohort: Iterable[int],
        round_number: int,
        context: str = "",
        random_bytes: RandomBytes = os.urandom,
    ) -> None:
        """`keys` has those of the whole cohort; else raises IdentityError, naming the first client without.

        `context`: what the server told about weights; a client that was told something else is caught as a roster is.

        Raises ProtocolError for a cohort of one, or without this client.
        """
        self._keys, self._id, self._round, self._context = keys, client_id, round_number, context
        self._cohort = checked_cohort(cohort)
        if client_id not in self._cohort:
            raise ProtocolError(f"{client_name(client_id)} is not in round {round_number}'s cohort {self._cohort}")
        # All at once: a client that comes back during the round replaces its keys.
        others = [other for other in self._cohort if other != client_id]
        purpose = f"mask of round {round_number} over {self._cohort}"
        self._pair_seeds = {other: keys.pair_secret(other, purpose) for other in others}
        self._tag_keys = {other: keys.pair_secret(other, "survivors' tags") for other in others}
        self._own_seed = random_bytes(SECRET_BYTES)
        self._masked = False
        self._attested: tuple[int, ...] = ()

    def mask(self, x_N: torch.Tensor) -> torch.Tensor:
        """y, int64 [N], for the server. Raises as `encode_fixed`; ReplayError if `keys` masked this round before."""
        if self._masked:
            raise ProtocolError(f"round {self._round} was masked already; masks serve for one vector only")
        y_N = encode_fixed(x_N, clients=len(self._cohort))
        self._keys.use_once(f"mask of round {self._round}")
        self._masked = True
        add_mask(y_N, self._own_seed, +1)
        for other, seed in self._pair_seeds.items():
            add_mask(y_N, seed, sign(self._id, other))
        return y_N

    def attest(self, survivors: Sequence[int]) -> dict[int, bytes]:
        """The tag for each other survivor: HMAC-SHA-256 under the pair's key, which is bound to the run.

        Raises ProtocolError unless the survivors are of the cohort, ascending, more than half of it, at least two,
        with this client among them, and the same as in an earlier call.
        """
        roster = checked_survivors(self._cohort, survivors)
        if not self._masked:
            raise ProtocolError(f"survivors of round {self._round} came before this client sent anything")
        if self._id not in roster:
            raise ProtocolError(f"{client_name(self._id)} is not among round {self._round}'s survivors {roster}")
        if self._attested not in ((), roster):
            raise ProtocolError(
                f"the server named {roster} as round {self._round}'s survivors, and before that {self._attested}"
            )
        self._attested = roster
        return {other: self._tag(self._id, other) for other in roster if other != self._id}

    def reveal(self, survivors: Sequence[int], tags: Mapping[int, bytes]) -> torch.Tensor:
        """Own seed, then the seeds with lost clients in ascending order: uint8 [1 + lost, 32].

        Raises ProtocolError for other survivors than those attested, TamperError naming the client whose tag is
        missing or does not fit: it was told of other survivors or another cohort, or the server made the tag up.
        """
        if not self._attested or tuple(survivors) != self._attested:
            what = f"for survivors {tuple(survivors)} after attesting {self._attested or 'none'}"
            raise ProtocolError(f"round {self._round}: asked to reveal {what}")
        for other in self._attested:
            if other != self._id and not hmac.compare_digest(tags.get(other, b""), self._tag(other, self._id)):
                raise TamperError(
                    f"round {self._round}: {client_name(other)} does not attest that the survivors are {self._attested}"
                )
        lost = [other for other in self._cohort if other not in self._attested]
        return _pack([self._own_seed, *(self._pair_seeds[other] for other in lost)])

    def _tag(self, frm: int, to: int) -> bytes:
        content = json.dumps([self._round, frm, to, self._cohort, self._attested, self._context])
        return hmac.digest(self._tag_keys[to if frm == self._id else frm], content.encode(), "sha256")


def checked_survivors(cohort: Sequence[int], survivors: Sequence[int]) -> tuple[int, ...]:
    """Raises ProtocolError unless they are of the cohort, ascending, more than half of it and at least two."""
    roster = tuple(survivors)
    if any(type(client) is not int for client in roster) or list(roster) != sorted(set(roster) & set(cohort)):
        raise ProtocolError(f"survivors {roster} are not ascending ids of the cohort {tuple(cohort)}")
    if len(roster) < 2 or 2 * len(roster) <= len(cohort):
        raise ProtocolError(
            f"{len(roster)} of {len(cohort)} clients are left; more than half and at least 2 are needed, or the sum "
            "would tell about single clients: start the run again without those that are lost"
        )
    return roster


def pack_tags(tags: Mapping[int, bytes]) -> torch.Tensor:
    """Client id → tag, as a frame carries it: uint8 [tags, 32], by ascending id. On the wire the ids are implied."""
    return _pack([tags[client] for client in sorted(tags)])


def unpack_tags(rows: torch.Tensor, survivors: Sequence[int], *, but: int) -> dict[int, bytes]:
    """Counterpart of `pack_tags` for all survivors `but` one. Raises ProtocolError."""
    others = [client for client in sorted(survivors) if client != but]
    return dict(zip(others, unpack(rows, len(others), f"tags from or for {client_name(but)}"), strict=True))


def _pack(rows: Sequence[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), SECRET_BYTES)


def unpack(rows: torch.Tensor, count: int, what: str) -> list[bytes]:
    if rows.dtype != torch.uint8 or rows.shape != (count, SECRET_BYTES):
        raise ProtocolError(f"{what} came as {shown(rows)}; uint8 [{count}, {SECRET_BYTES}] was due")
    return [row.numpy().tobytes() for row in rows.cpu()]


def checked_cohort(cohort: Iterable[int]) -> tuple[int, ...]:
    """Ascending. Raises ProtocolError."""
    given = list(cohort)
    if len(set(given)) < max(len(given), 2) or any(type(client) is not int for client in given):
        raise ProtocolError(f"{given} is no cohort: it takes the ids of two or more different clients")
    return tuple(sorted(given))


def sign(client: int, other: int) -> int:
    """Of their pair's mask in the vector of `client`; opposite for the two."""
    return 1 if other > client else -1


def shown(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
