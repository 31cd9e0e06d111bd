"""The cryptography of the handshake, each piece once: X25519, RSA-OAEP, RSA-PSS, HKDF; all of it PyCryptodome's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from Crypto.Cipher import PKCS1_OAEP
from Crypto.Hash import SHA256
from Crypto.Protocol.DH import import_x25519_public_key, key_agreement
from Crypto.Protocol.KDF import HKDF
from Crypto.PublicKey import ECC, RSA
from Crypto.Signature import pss

from hpc.errors import HandshakeError, IdentityError

SECRET_BYTES = 32
_LABEL = b"hpc-flglm link 1 "  # keeps these signatures and keys apart from any other use of the same RSA key

RandomBytes = Callable[[int], bytes]


class Ephemeral:
    """An X25519 key pair (RFC 7748) for one use."""

    def __init__(self, random_bytes: RandomBytes) -> None:
        self._private = ECC.construct(curve="Curve25519", seed=random_bytes(SECRET_BYTES))
        self.public = bytes(self._private.public_key().export_key(format="raw"))

    def agree(self, public: bytes) -> bytes:
        """32 shared bytes. Raises HandshakeError for a key that is none or gives no secret (low order)."""
        try:
            shared = key_agreement(eph_priv=self._private, eph_pub=import_x25519_public_key(public), kdf=bytes)
        except ValueError:
            shared = b""
        if not any(shared):
            raise HandshakeError("the peer's X25519 key is unusable")
        return shared


@dataclass(kw_only=True, frozen=True)
class Keys:
    """One AES-256 key for each direction of the channel, and of the terms that end the handshake."""

    client: bytes = field(repr=False)
    server: bytes = field(repr=False)
    client_terms: bytes = field(repr=False)
    server_terms: bytes = field(repr=False)


def derive_keys(shared: bytes, secret_server: bytes, secret_client: bytes, *, salt: bytes) -> Keys:
    """HKDF-SHA-256 (RFC 5869) over the three secrets, salted with the transcript's hash."""
    names = ("client", "server", "client_terms", "server_terms")
    secret = shared + secret_server + secret_client
    return Keys(**{name: derive(secret, salt=salt, purpose=name) for name in names})


def derive(secret: bytes, *, salt: bytes, purpose: str) -> bytes:
    """A 32-byte key for one purpose."""
    return hkdf(secret, SECRET_BYTES, salt=salt, info=_LABEL + purpose.encode())


def hkdf(secret: bytes, size: int, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA-256 (RFC 5869): `size` bytes. Raises ValueError for more than it can give (8160)."""
    key = HKDF(secret, size, salt, SHA256, context=info)
    assert isinstance(key, bytes)
    return key


def wrap(public: RSA.RsaKey, secret: bytes, random_bytes: RandomBytes) -> bytes:
    """RSA-OAEP with SHA-256 (RFC 8017)."""
    return PKCS1_OAEP.new(public, hashAlgo=SHA256, randfunc=random_bytes).encrypt(secret)


def unwrap(private: RSA.RsaKey, wrapped: bytes, *, who: str) -> bytes:
    """Counterpart of `wrap`; only for what `verify` has accepted. Raises IdentityError."""
    secret = oaep_open(private, wrapped)
    if secret is None or len(secret) != SECRET_BYTES:
        raise IdentityError(f"{who} wrapped its secret for another key than this one's")
    return secret


def oaep_open(private: RSA.RsaKey, wrapped: bytes) -> bytes | None:
    """What was sealed with RSA-OAEP, SHA-256 and an empty label; None for anything else, without saying what it is."""
    try:
        return PKCS1_OAEP.new(private, hashAlgo=SHA256).decrypt(wrapped)
    except (ValueError, TypeError):
        return None


def sign(private: RSA.RsaKey, digest: bytes, purpose: str, random_bytes: RandomBytes) -> bytes:
    """RSA-PSS with SHA-256 (RFC 8017) over a purpose and a digest."""
    return pss.new(private, rand_func=random_bytes).sign(SHA256.new(_signed(digest, purpose)))


def verify(public: RSA.RsaKey, digest: bytes, purpose: str, signature: bytes, *, who: str) -> None:
    """Raises IdentityError unless `who` signed exactly this."""
    try:
        pss.new(public).verify(SHA256.new(_signed(digest, purpose)), signature)
    except (ValueError, TypeError):
        raise IdentityError(
            f"the signature of {who} does not fit: it lacks the pinned key, or a message was altered on the way"
        ) from None


def _signed(digest: bytes, purpose: str) -> bytes:
    return _LABEL + purpose.encode() + hashlib.sha256(digest).digest()
