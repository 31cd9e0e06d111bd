"""From a connected transport to a sealed channel: identities, handshake, cipher."""

from __future__ import annotations

import logging

from hpc.config import LinkConfig
from hpc.errors import IdentityError
from hpc.link.channel import Channel
from hpc.link.cipher import Cipher, PlainCipher, make_cipher
from hpc.link.conversation import Agreement
from hpc.link.handshake import Session, client_handshake, server_handshake
from hpc.link.identity import SERVER, Authorised, client_name, load_private, load_server_public
from hpc.link.transport import Transport

_log = logging.getLogger("hpc.link")


def open_client_channel(
    transport: Transport, *, link: LinkConfig, client_id: int, agreement: Agreement, facts: Agreement | None = None
) -> tuple[Channel, Session]:
    """The client's end, with the keys in `link.keys_dir`. Raises IdentityError, HandshakeError, PeerLost."""
    session = client_handshake(
        transport,
        identity=load_private(link.keys_dir, client_name(client_id)),
        server_public=load_server_public(link.keys_dir),
        client_id=client_id,
        agreement=_with_encryption(agreement, link),
        timeout_s=link.timeout_s,
        facts=facts,
    )
    return open_channel(transport, link=link, session=session), session


def open_server_channel(
    transport: Transport, *, link: LinkConfig, client_id: int, agreement: Agreement, facts: Agreement | None = None
) -> tuple[Channel, Session]:
    """The trunk's end of client `client_id`'s link. Raises IdentityError, HandshakeError, PeerLost."""
    try:
        session = server_handshake(
            transport,
            identity=load_private(link.keys_dir, SERVER),
            authorised=Authorised.load(link.keys_dir),
            expected_client_id=client_id,
            agreement=_with_encryption(agreement, link),
            timeout_s=link.timeout_s,
            facts=facts,
        )
    except IdentityError as error:
        raise IdentityError(f"{client_name(client_id)}: {error}") from None
    return open_channel(transport, link=link, session=session), session


def open_channel(transport: Transport, *, link: LinkConfig, session: Session) -> Channel:
    """A channel under the session's keys, or in the clear (and loudly so) with `link.encryption=off`."""
    ciphers: list[Cipher] = [make_cipher(link.cipher_library, key) for key in (session.send_key, session.recv_key)]
    if link.encryption == "off":
        _log.warning(
            "ENCRYPTION IS OFF on the link with %s: activations and gradients travel as PLAINTEXT that anyone "
            "on the way can read and alter. For measurements only.",
            session.peer_name,
        )
        ciphers = [PlainCipher(), PlainCipher()]
    sealed = "PLAINTEXT" if link.encryption == "off" else f"{link.encryption} by {link.cipher_library}"
    _log.info("linked to %s over %s, %s", session.peer_name, transport.name, sealed)
    return Channel(
        transport,
        send_cipher=ciphers[0],
        recv_cipher=ciphers[1],
        chunk_bytes=link.chunk_bytes,
        timeout_s=link.timeout_s,
        peer=session.peer_name,
    )


def _with_encryption(agreement: Agreement, link: LinkConfig) -> Agreement:
    """One end alone cannot switch encryption off."""
    return {**agreement, "link.encryption": link.encryption}
