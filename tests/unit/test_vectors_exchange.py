"""The handshake's HKDF-SHA-256 and X25519 against the RFCs' vectors and Wycheproof's."""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter

import pytest

from hpc.errors import HandshakeError
from hpc.link.key_exchange import Ephemeral, derive, hkdf
from tests.vectors import responses, standard, wycheproof


def test_hkdf_of_rfc_5869() -> None:
    text = standard("KDF/rfc-5869-HKDF-SHA256.txt").replace("\n\nPRK", "\nPRK")  # a blank line within a vector
    vectors = [vector for vector in responses(text) if "OKM" in vector]
    assert len(vectors) == 3
    for vector in [*vectors, *responses(standard("KDF/hkdf-generated.txt"))]:
        secret, salt, info, okm = (bytes.fromhex(vector[name]) for name in ("IKM", "salt", "info", "OKM"))
        assert hkdf(secret, int(vector["L"]), salt=salt, info=info) == okm


def test_hkdf_of_wycheproof() -> None:
    seen: Counter[str] = Counter()
    for _, test in wycheproof("Protocol/hkdf_sha256_test.json"):
        secret, salt, info, okm = (bytes.fromhex(test[name]) for name in ("ikm", "salt", "info", "okm"))
        seen[test["result"]] += 1
        if test["result"] == "valid":
            assert hkdf(secret, test["size"], salt=salt, info=info) == okm
        else:
            with pytest.raises(ValueError):
                hkdf(secret, test["size"], salt=salt, info=info)
    assert seen["valid"] > 50
    assert seen["invalid"]


def test_a_key_for_a_purpose_is_hkdf_with_our_label() -> None:
    """Against RFC 5869 written out with HMAC: extract, then a single block of expand."""
    prk = hmac.digest(b"salt", b"secret", hashlib.sha256)
    info = b"hpc-flglm link 1 client"
    assert derive(b"secret", salt=b"salt", purpose="client") == hmac.digest(prk, info + b"\1", hashlib.sha256)


def agree(private: str, public: str) -> bytes:
    return Ephemeral(lambda size: bytes.fromhex(private)).agree(bytes.fromhex(public))


def test_x25519_of_rfc_7748() -> None:
    vectors = [vector for vector in responses(standard("asymmetric/X25519/rfc7748.txt")) if "OUTPUT_U" in vector]
    assert len(vectors) >= 3
    for vector in vectors:
        assert agree(vector["INPUT_SCALAR"], vector["INPUT_U"]).hex() == vector["OUTPUT_U"]


def test_x25519_of_wycheproof() -> None:
    """Every pair gives its secret, on the twist and non-canonical as well; a point of low order gives none."""
    seen: Counter[str] = Counter()
    for _, test in wycheproof("Protocol/x25519_test.json"):
        if "ZeroSharedSecret" in test["flags"]:
            seen["low order"] += 1
            with pytest.raises(HandshakeError, match="X25519 key is unusable"):
                agree(test["private"], test["public"])
        else:
            seen["agreed"] += 1
            assert agree(test["private"], test["public"]).hex() == test["shared"], test["tcId"]
    assert seen["low order"] >= 20, seen
    assert seen["agreed"] >= 450, seen


@pytest.mark.parametrize("size", [0, 31, 33])
def test_x25519_keys_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(HandshakeError, match="X25519 key is unusable"):
        agree("77" * 32, "09" * size)
