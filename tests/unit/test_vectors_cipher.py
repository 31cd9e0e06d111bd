"""AES-256-GCM of both libraries against NIST's vectors and Wycheproof's: right ones match, wrong ones are refused."""

from __future__ import annotations

import pytest

from hpc.errors import TamperError
from hpc.link.cipher import NONCE_BYTES, TAG_BYTES, make_cipher
from tests.vectors import responses, standard, wycheproof

pytestmark = pytest.mark.parametrize("library", ["openssl", "pycryptodome"])
GCM = "ciphers/AES/GCM/gcm{}256.rsp"


def seal(library: str, key: bytes, nonce: bytes, plain: bytes, aad: bytes) -> bytes:
    out = bytearray(len(plain) + TAG_BYTES)
    make_cipher(library, key).seal_into(nonce, plain, aad, memoryview(out))
    return bytes(out)


def open_(library: str, key: bytes, nonce: bytes, sealed: bytes, aad: bytes) -> bytes:
    out = bytearray(len(sealed) - TAG_BYTES)
    make_cipher(library, key).open_into(nonce, sealed, aad, memoryview(out))
    return bytes(out)


def of_nist(name: str) -> list[dict[str, str]]:
    """With the sizes of nonce and tag that links use."""
    sizes = {"IVlen": str(8 * NONCE_BYTES), "Taglen": str(8 * TAG_BYTES)}
    return [vector for vector in responses(standard(GCM.format(name))) if vector.items() >= sizes.items()]


def parts(vector: dict[str, str], *names: str) -> list[bytes]:
    return [bytes.fromhex(vector[name]) for name in names]


def test_nist_sealing(library: str) -> None:
    vectors = of_nist("EncryptExtIV")
    assert len(vectors) == 375
    for vector in vectors:
        key, nonce, plain, aad, sealed, tag = parts(vector, "Key", "IV", "PT", "AAD", "CT", "Tag")
        assert seal(library, key, nonce, plain, aad) == sealed + tag


def test_nist_opening(library: str) -> None:
    """About half of them must fail."""
    vectors = of_nist("Decrypt")
    assert len(vectors) == 375
    refused = 0
    for vector in vectors:
        key, nonce, sealed, aad, tag = parts(vector, "Key", "IV", "CT", "AAD", "Tag")
        if "FAIL" in vector:
            refused += 1
            with pytest.raises(TamperError, match="the tag does not fit"):
                open_(library, key, nonce, sealed + tag, aad)
        else:
            assert open_(library, key, nonce, sealed + tag, aad) == bytes.fromhex(vector["PT"])
    assert 100 < refused < 275


def test_wycheproof(library: str) -> None:
    """Counters that wrap, tags with single bits changed, tags of zeros and ones."""
    seen = {"valid": 0, "invalid": 0}
    for group, test in wycheproof("Cipher/aes_gcm_test.json"):
        if (group["keySize"], group["ivSize"], group["tagSize"]) != (256, 8 * NONCE_BYTES, 8 * TAG_BYTES):
            continue
        key, nonce, plain, aad, sealed, tag = parts(test, "key", "iv", "msg", "aad", "ct", "tag")
        seen[test["result"]] += 1
        if test["result"] == "valid":
            assert seal(library, key, nonce, plain, aad) == sealed + tag
            assert open_(library, key, nonce, sealed + tag, aad) == plain
        else:
            with pytest.raises(TamperError, match="the tag does not fit"):
                open_(library, key, nonce, sealed + tag, aad)
    assert min(seen.values()) >= 20, seen


def test_no_other_key_size_is_taken(library: str) -> None:
    """AES-128 and AES-192 have vectors too; links have no use for them."""
    for name in ("128", "192"):
        vector = next(responses(standard(f"ciphers/AES/GCM/gcmEncryptExtIV{name}.rsp")))
        with pytest.raises(ValueError, match="AES-256 takes 32"):
            make_cipher(library, bytes.fromhex(vector["Key"]))
