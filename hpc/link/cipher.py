"""AES-256-GCM behind one small interface: OpenSSL's for bulk data, PyCryptodome's as the reference.

Both give the same bytes (NIST SP 800-38D): ciphertext, then a tag of 16 bytes. `PlainCipher` is what
`link.encryption=off` asks for and is never chosen for any other reason.
"""

from __future__ import annotations

from typing import Protocol

from Crypto.Cipher import AES
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hpc.errors import NonceExhausted, TamperError

KEY_BYTES = 32
NONCE_BYTES = 12
TAG_BYTES = 16

Buffer = bytes | bytearray | memoryview


class Cipher(Protocol):
    """Seals under one key. Buffers are contiguous and one-dimensional."""

    overhead: int
    """Bytes that sealing adds."""

    def seal_into(self, nonce: bytes, plain: Buffer, aad: Buffer, out: memoryview) -> None:
        """Write len(plain) + overhead bytes to `out`, which has exactly that size."""

    def open_into(self, nonce: bytes, sealed: Buffer, aad: Buffer, out: memoryview) -> None:
        """Write len(sealed) - overhead bytes to `out`.

        Raises TamperError unless key, nonce, data and associated data are those of the seal; `out` then holds
        bytes that nobody vouches for.
        """


def _check_sizes(plain: int, sealed: int, overhead: int) -> None:
    if sealed != plain + overhead:
        raise TamperError(f"{sealed} sealed bytes for {plain} plain ones; {plain + overhead} were due")


class OpenSSLCipher:
    """AES-256-GCM by OpenSSL (`cryptography`)."""

    overhead = TAG_BYTES

    def __init__(self, key: bytes) -> None:
        self._aead = AESGCM(_checked(key))

    def seal_into(self, nonce: bytes, plain: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(plain), len(out), TAG_BYTES)
        self._aead.encrypt_into(nonce, plain, aad, out)

    def open_into(self, nonce: bytes, sealed: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(out), len(sealed), TAG_BYTES)
        try:
            self._aead.decrypt_into(nonce, sealed, aad, out)
        except InvalidTag:
            raise TamperError("the tag does not fit: altered, or sealed under another key") from None


class PyCryptodomeCipher:
    """AES-256-GCM by PyCryptodome, which wants a new object for every message."""

    overhead = TAG_BYTES

    def __init__(self, key: bytes) -> None:
        self._key = _checked(key)

    def seal_into(self, nonce: bytes, plain: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(plain), len(out), TAG_BYTES)
        gcm = AES.new(self._key, AES.MODE_GCM, nonce=nonce, mac_len=TAG_BYTES)
        gcm.update(aad)
        if len(plain):
            gcm.encrypt(plain, output=out[: len(plain)])
        out[len(plain) :] = gcm.digest()

    def open_into(self, nonce: bytes, sealed: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(out), len(sealed), TAG_BYTES)
        gcm = AES.new(self._key, AES.MODE_GCM, nonce=nonce, mac_len=TAG_BYTES)
        gcm.update(aad)
        whole = memoryview(sealed)
        if len(out):
            gcm.decrypt(whole[: len(out)], output=out)
        try:
            gcm.verify(bytes(whole[len(out) :]))
        except ValueError:
            raise TamperError("the tag does not fit: altered, or sealed under another key") from None


class PlainCipher:
    """No encryption and no authentication of what is sent; for measurements."""

    overhead = 0

    def seal_into(self, nonce: bytes, plain: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(plain), len(out), 0)
        out[:] = plain

    def open_into(self, nonce: bytes, sealed: Buffer, aad: Buffer, out: memoryview) -> None:
        _check_sizes(len(out), len(sealed), 0)
        out[:] = sealed


def make_cipher(library: str, key: bytes) -> Cipher:
    """`openssl` or `pycryptodome` (LinkConfig.cipher_library) under a key of 32 bytes."""
    libraries: dict[str, type[OpenSSLCipher] | type[PyCryptodomeCipher]]
    libraries = {"openssl": OpenSSLCipher, "pycryptodome": PyCryptodomeCipher}
    return libraries[library](key)


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"key of {len(key)} bytes; AES-256 takes {KEY_BYTES}")
    return key


class NonceCounter:
    """The 96-bit nonces of one direction under one key: a fixed field of 4 zero bytes, then a 64-bit counter.

    This is SP 800-38D's deterministic construction (8.2.1): one device and one direction to a key, so the fixed
    field may be constant and uniqueness follows from the counter. The bound of 2**32 seals to a key is for random
    nonces (8.3); here the counter's own end is the limit. A MiB chunk a microsecond would take 580,000 years.
    """

    def __init__(self, *, start: int = 0, limit: int = 2**64 - 1) -> None:
        self.count = start
        self._limit = limit

    def current(self) -> bytes:
        """The nonce to use now, the same until `advance`. Raises NonceExhausted at the limit."""
        if self.count >= self._limit:
            raise NonceExhausted(f"all {self._limit} nonces of this key are used; a new handshake gives a new key")
        return self.count.to_bytes(NONCE_BYTES, "big")

    def advance(self) -> None:
        """Call after a seal or an opening that succeeded."""
        self.count += 1
