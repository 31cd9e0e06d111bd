"""Both libraries are AES-256-GCM; anything altered is refused; nonces end before they repeat."""

from __future__ import annotations

import pytest

from hpc.errors import NonceExhausted, TamperError
from hpc.link.cipher import Cipher, NonceCounter, OpenSSLCipher, PlainCipher, PyCryptodomeCipher, make_cipher

LIBRARIES = ["openssl", "pycryptodome"]
KEY, NONCE, AAD = bytes(range(32)), bytes(12), b"header"


def seal(cipher: Cipher, plain: bytes, nonce: bytes = NONCE, aad: bytes = AAD) -> bytes:
    out = bytearray(len(plain) + cipher.overhead)
    cipher.seal_into(nonce, plain, aad, memoryview(out))
    return bytes(out)


def open_(cipher: Cipher, sealed: bytes, nonce: bytes = NONCE, aad: bytes = AAD) -> bytes:
    out = bytearray(len(sealed) - cipher.overhead)
    cipher.open_into(nonce, sealed, aad, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("sealer", LIBRARIES)
@pytest.mark.parametrize("opener", LIBRARIES)
@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 4096, 100_001])
def test_each_library_opens_the_other(sealer: str, opener: str, size: int) -> None:
    plain = bytes(i % 251 for i in range(size))
    assert open_(make_cipher(opener, KEY), seal(make_cipher(sealer, KEY), plain)) == plain


# McGrew and Viega, The Galois/Counter Mode of Operation, test cases 13, 14 and 16 (also in NIST's GCM examples).
CASE_16_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525"
    "b16aedf5aa0de657ba637b39"
)
CASE_16_SEALED = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838"
    "c5f61e6393ba7a0abcc9f662" + "76fc6ece0f4e1768cddf8853bb2d551b"
)
KNOWN = [
    ("00" * 32, "00" * 12, "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    ("00" * 32, "00" * 12, "00" * 16, "", "cea7403d4d606b6e074ec5d3baf39d18d0d1c8a799996bf0265b98b5d48ab919"),
    (
        "feffe9928665731c6d6a8f9467308308" * 2,
        "cafebabefacedbaddecaf888",
        CASE_16_PLAIN,
        "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        CASE_16_SEALED,
    ),
]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("vector", KNOWN, ids=["case 13", "case 14", "case 16"])
def test_known_answers(library: str, vector: tuple[str, ...]) -> None:
    key, nonce, plain, aad, sealed = map(bytes.fromhex, vector)
    cipher = make_cipher(library, key)
    assert seal(cipher, plain, nonce, aad) == sealed
    assert open_(cipher, sealed, nonce, aad) == plain


@pytest.mark.parametrize("library", LIBRARIES)
def test_anything_wrong_is_refused(library: str) -> None:
    cipher, plain = make_cipher(library, KEY), b"the patient's name"
    sealed = seal(cipher, plain)
    with pytest.raises(TamperError):
        open_(make_cipher(library, bytes(32)), sealed)
    with pytest.raises(TamperError):
        open_(cipher, sealed, nonce=b"\1" * 12)
    with pytest.raises(TamperError):
        open_(cipher, sealed, aad=b"other")
    for cut in (sealed[:-1], sealed[1:], sealed + b"\0"):
        with pytest.raises(TamperError):
            open_(cipher, cut)
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1
        with pytest.raises(TamperError):
            open_(cipher, bytes(altered))


@pytest.mark.parametrize("cipher", [OpenSSLCipher(KEY), PyCryptodomeCipher(KEY), PlainCipher()])
def test_wrong_output_size_is_refused(cipher: Cipher) -> None:
    with pytest.raises(TamperError, match="were due"):
        cipher.open_into(NONCE, bytes(40), AAD, memoryview(bytearray(39)))


def test_short_key_is_refused() -> None:
    for library in LIBRARIES:
        with pytest.raises(ValueError, match="16 bytes"):
            make_cipher(library, bytes(16))


def test_nonces_count_and_end_before_use() -> None:
    nonces = NonceCounter(limit=2)
    seen = []
    for _ in range(2):
        assert nonces.current() == nonces.current()  # only success advances
        seen.append(nonces.current())
        nonces.advance()
    assert seen == [bytes(12), bytes(11) + b"\1"]
    with pytest.raises(NonceExhausted, match="all 2 nonces"):
        nonces.current()


def test_default_limit_is_the_counters_end() -> None:
    last = NonceCounter(start=2**64 - 2)
    assert last.current() == bytes(4) + b"\xff" * 7 + b"\xfe"
    last.advance()
    with pytest.raises(NonceExhausted):
        last.current()
