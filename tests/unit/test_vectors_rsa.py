"""The handshake's RSA-OAEP and RSA-PSS against public vectors, and the same of other parameters than ours refused."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from Crypto.PublicKey import RSA
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from hpc.errors import IdentityError
from hpc.link import key_exchange
from hpc.link.identity import load_private, load_public
from hpc.link.key_exchange import SECRET_BYTES, oaep_open, sign, unwrap, verify, wrap
from tests.vectors import standard, wycheproof

OURS = {"sha": "SHA-256", "mgfSha": "SHA-256"}
OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
PSS = padding.PSS(padding.MGF1(hashes.SHA256()), 32)

import_key = cache(RSA.import_key)


def oaep_of_wycheproof() -> Iterator[tuple[RSA.RsaKey, dict[str, Any]]]:
    """Private key and vector of each with SHA-256 for both."""
    files = [f"rsa_oaep_{bits}_sha256_mgf1sha256_test.json" for bits in (2048, 3072, 4096)]
    for file in [*files, "rsa_oaep_misc_test.json"]:
        for group, test in wycheproof(f"Cipher/{file}"):
            if group.items() >= OURS.items():
                yield import_key(group["privateKeyPem"]), test


def test_oaep_of_cryptography() -> None:
    """NIST's keys and messages, sealed anew with SHA-256."""
    lines = standard("asymmetric/RSA/oaep-custom/oaep-sha256-sha256.txt").splitlines()
    key, count = None, 0
    for number, line in enumerate(lines):
        if line == "# Private key":
            assert lines[number + 1 : number + 7 : 2] == ["# Modulus:", "# Public exponent:", "# Exponent:"]
            key = RSA.construct(tuple(int(each, 16) for each in lines[number + 2 : number + 8 : 2]))
        elif line == "# Message:" and key is not None:
            assert lines[number + 2] == "# Encryption:"
            count += 1
            assert oaep_open(key, bytes.fromhex(lines[number + 3])) == bytes.fromhex(lines[number + 1])
    assert count >= 50


def test_oaep_of_wycheproof() -> None:
    """Good ones open; altered ones, such of another size, and good ones under a label do not."""
    seen: Counter[str] = Counter()
    for key, test in oaep_of_wycheproof():
        sealed, message = bytes.fromhex(test["ct"]), bytes.fromhex(test["msg"])
        due = message if test["result"] == "valid" and not test["label"] else None
        seen["opened" if due is not None else "refused"] += 1
        assert oaep_open(key, sealed) == due, test
    assert seen["opened"] >= 30, seen
    assert seen["refused"] >= 50, seen


def test_a_secret_that_does_not_open_is_refused_without_saying_why() -> None:
    """One of 32 bytes is taken; whatever else it is, the words are the same, so that they teach nobody anything."""
    words, taken = set(), 0
    for key, test in oaep_of_wycheproof():
        if test["result"] == "valid" and not test["label"] and len(test["msg"]) == 2 * SECRET_BYTES:
            taken += 1
            assert unwrap(key, bytes.fromhex(test["ct"]), who="client-0") == bytes.fromhex(test["msg"])
        else:
            with pytest.raises(IdentityError) as error:
                unwrap(key, bytes.fromhex(test["ct"]), who="client-0")
            words.add(str(error.value))
    assert taken >= 3
    assert words == {"client-0 wrapped its secret for another key than this one's"}


def test_another_library_opens_what_is_wrapped(pristine_keys: Path) -> None:
    private = load_pem_private_key((pristine_keys / "client-0.key").read_bytes(), None)
    assert isinstance(private, rsa.RSAPrivateKey)
    public = load_public(pristine_keys / "authorized_clients" / "client-0.pem")
    secret = bytes(range(SECRET_BYTES))
    assert private.decrypt(wrap(public, secret, lambda size: b"\x5a" * size), OAEP) == secret


@pytest.mark.parametrize("bits", [2048, 3072, 4096])
def test_pss_of_wycheproof(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `verify` itself, which signs over a label and a digest: here over the vector's message instead."""
    monkeypatch.setattr(key_exchange, "_signed", lambda digest, purpose: digest)
    seen: Counter[str] = Counter()
    for group, test in wycheproof(f"Signature/rsa_pss_{bits}_sha256_mgf1_32_test.json"):
        assert (group["sha"], group["mgfSha"], group["sLen"]) == ("SHA-256", "SHA-256", 32)
        public = import_key(group["publicKeyPem"])
        message, signature = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
        seen[test["result"]] += 1
        if test["result"] == "valid":
            verify(public, message, "client", signature, who="client-0")
        else:
            with pytest.raises(IdentityError, match="the signature of client-0 does not fit"):
                verify(public, message, "client", signature, who="client-0")
    assert min(seen["valid"], seen["invalid"]) >= 30, seen


@pytest.mark.parametrize("name", ["2048_sha256_mgf1_0", "2048_sha256_mgf1sha1_20", "2048_sha384_mgf1_48"])
def test_good_signatures_of_other_parameters_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No salt, SHA-1 in the mask, SHA-384: good for who asks for that, which links do not."""
    monkeypatch.setattr(key_exchange, "_signed", lambda digest, purpose: digest)
    good = [pair for pair in wycheproof(f"Signature/rsa_pss_{name}_test.json") if pair[1]["result"] == "valid"]
    assert good
    for group, test in good[:20]:
        with pytest.raises(IdentityError, match="does not fit"):
            verify(
                import_key(group["publicKeyPem"]), bytes.fromhex(test["msg"]), "", bytes.fromhex(test["sig"]), who="it"
            )


def test_another_library_verifies_what_is_signed(pristine_keys: Path) -> None:
    """And what it signs holds here: over our label, the purpose and the digest's SHA-256."""
    digest = hashlib.sha256(b"transcript").digest()
    signed = b"hpc-flglm link 1 client" + hashlib.sha256(digest).digest()
    mine = load_private(pristine_keys, "client-0").key
    public = load_pem_public_key((pristine_keys / "authorized_clients" / "client-0.pem").read_bytes())
    private = load_pem_private_key((pristine_keys / "client-0.key").read_bytes(), None)
    assert isinstance(public, rsa.RSAPublicKey)
    assert isinstance(private, rsa.RSAPrivateKey)
    public.verify(sign(mine, digest, "client", lambda size: b"\x5a" * size), signed, PSS, hashes.SHA256())
    theirs = private.sign(signed, PSS, hashes.SHA256())
    verify(mine.public_key(), digest, "client", theirs, who="client-0")
    with pytest.raises(IdentityError):
        verify(mine.public_key(), digest, "server", theirs, who="client-0")
