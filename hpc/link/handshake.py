"""Mutual authentication and fresh keys for one link.

    client → server   hello     who I am, X25519 public key
    server → client   hello     who I am, X25519 public key, a secret wrapped for the client (RSA-OAEP)
    client → server   secret    a secret wrapped for the server
    client → server   proof     RSA-PSS signature over all messages so far
    server → client   proof     RSA-PSS signature over all messages so far
    client → server   terms     agreement and facts, sealed: opening them confirms the keys
    server → client   terms     agreement and facts, sealed

Keys: HKDF-SHA-256 (RFC 5869) over X25519 (RFC 7748) and both secrets, salted with the hash of the transcript.
X25519 gives forward secrecy, the secrets tie the keys to both RSA identities. OAEP and PSS (RFC 8017) use SHA-256.
A secret is unwrapped only after the signature over it held, so nobody without a known key can query OAEP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from Crypto.PublicKey import RSA

from hpc.errors import HandshakeError, IdentityError
from hpc.link.conversation import Agreement, Conversation, require_agreement
from hpc.link.identity import SERVER, Authorised, Identity, client_name, fingerprint, short
from hpc.link.key_exchange import SECRET_BYTES, Ephemeral, RandomBytes, derive_keys, sign, unwrap, verify, wrap
from hpc.link.transport import Transport

PROTOCOL = 1


@dataclass(kw_only=True, frozen=True)
class Session:
    """What a handshake settled. Each direction has its own AES-256 key; neither is ever shown."""

    peer_name: str
    send_key: bytes = field(repr=False)
    recv_key: bytes = field(repr=False)
    facts: Agreement
    """What the peer tells of itself, such as its number of examples; not compared."""
    transcript_hash: str
    """SHA-256 of the handshake, hex; equal on both ends."""


def client_handshake(
    transport: Transport,
    *,
    identity: Identity,
    server_public: RSA.RsaKey,
    client_id: int,
    agreement: Agreement,
    timeout_s: float,
    facts: Agreement | None = None,
    random_bytes: RandomBytes = os.urandom,
) -> Session:
    """Log in as client `client_id` to the server whose key is pinned; on any error the transport is closed.

    Raises IdentityError (either end refuses the other), HandshakeError (the agreements differ, or a message is
    malformed), PeerLost (nothing after `timeout_s` seconds in all).
    """
    talk, ephemeral = Conversation(transport, timeout_s), Ephemeral(random_bytes)
    with talk.closing_on_error():
        talk.say("hello", protocol=PROTOCOL, client_id=client_id, key=identity.fingerprint, x25519=ephemeral.public)
        hello = talk.hear("hello", protocol=int, key=str, x25519=bytes, wrapped=bytes)
        _check_protocol(hello["protocol"])
        if hello["key"] != fingerprint(server_public):
            shown, pinned = short(hello["key"]), short(fingerprint(server_public))
            raise IdentityError(f"the server showed the key {shown}, but {pinned} is pinned")
        secret_client = random_bytes(SECRET_BYTES)
        talk.say("secret", wrapped=wrap(server_public, secret_client, random_bytes))
        talk.say("proof", signature=sign(identity.key, talk.digest(), "client", random_bytes))
        to_prove = talk.digest()
        verify(server_public, to_prove, SERVER, talk.hear("proof", signature=bytes)["signature"], who="the server")
        secret_server = unwrap(identity.key, hello["wrapped"], who="the server")
        transcript = talk.digest()
        keys = derive_keys(ephemeral.agree(hello["x25519"]), secret_server, secret_client, salt=transcript)
        talk.say_terms(keys.client_terms, agreement, facts or {})
        talk.may_refuse = False  # the server's own terms are its last word
        their_agreement, their_facts = talk.hear_terms(keys.server_terms)
        talk.finish()
    _agree(transport, agreement, their_agreement, peer=SERVER)
    return Session(
        peer_name=SERVER,
        send_key=keys.client,
        recv_key=keys.server,
        facts=their_facts,
        transcript_hash=transcript.hex(),
    )


def server_handshake(
    transport: Transport,
    *,
    identity: Identity,
    authorised: Authorised,
    expected_client_id: int,
    agreement: Agreement,
    timeout_s: float,
    facts: Agreement | None = None,
    random_bytes: RandomBytes = os.urandom,
) -> Session:
    """Let client `expected_client_id` in, if its key is authorised under that name; errors as in `client_handshake`."""
    talk, ephemeral = Conversation(transport, timeout_s), Ephemeral(random_bytes)
    name = client_name(expected_client_id)
    with talk.closing_on_error():
        hello = talk.hear("hello", protocol=int, client_id=int, key=str, x25519=bytes)
        _check_protocol(hello["protocol"])
        client_public = _admit(authorised, hello["key"], hello["client_id"], name)
        secret_server = random_bytes(SECRET_BYTES)
        wrapped = wrap(client_public, secret_server, random_bytes)
        talk.say("hello", protocol=PROTOCOL, key=identity.fingerprint, x25519=ephemeral.public, wrapped=wrapped)
        wrapped = talk.hear("secret", wrapped=bytes)["wrapped"]
        to_prove = talk.digest()
        verify(client_public, to_prove, "client", talk.hear("proof", signature=bytes)["signature"], who=name)
        secret_client = unwrap(identity.key, wrapped, who=name)
        talk.say("proof", signature=sign(identity.key, talk.digest(), SERVER, random_bytes))
        transcript = talk.digest()
        keys = derive_keys(ephemeral.agree(hello["x25519"]), secret_server, secret_client, salt=transcript)
        their_agreement, their_facts = talk.hear_terms(keys.client_terms)
        talk.say_terms(keys.server_terms, agreement, facts or {})
        talk.finish()
    _agree(transport, agreement, their_agreement, peer=name)
    return Session(
        peer_name=name,
        send_key=keys.server,
        recv_key=keys.client,
        facts=their_facts,
        transcript_hash=transcript.hex(),
    )


def _admit(authorised: Authorised, fingerprint_hex: str, client_id: int, expected: str) -> RSA.RsaKey:
    """The pinned key of the client that may come in here. Raises IdentityError."""
    owner, public = authorised.lookup(fingerprint_hex)
    if owner != client_name(client_id):
        raise IdentityError(f"the key {short(fingerprint_hex)} is {owner}'s; it cannot log in as client {client_id}")
    if owner != expected:
        raise IdentityError(f"{owner} came to the link of {expected}")
    return public


def _check_protocol(theirs: int) -> None:
    if theirs != PROTOCOL:
        raise HandshakeError(f"link protocol: here {PROTOCOL}, there {theirs}; run the same version on both ends")


def _agree(transport: Transport, here: Agreement, there: Agreement, *, peer: str) -> None:
    """Both ends have both agreements by now, so each finds the difference by itself."""
    try:
        require_agreement(here, there, peer=peer)
    except HandshakeError:
        transport.close()
        raise
