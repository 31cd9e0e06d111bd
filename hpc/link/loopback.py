"""A link within one process: real frames and real ciphers, no network. For two roles in two threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpc.config import LinkConfig
from hpc.link.channel import Channel
from hpc.link.cipher import PlainCipher, make_cipher
from hpc.link.transport import loopback_pair


def loopback_channels(
    link: LinkConfig, keys: tuple[bytes, bytes], *, wrap: Callable[[Any], Any] = lambda transport: transport
) -> tuple[Channel, Channel]:
    """Client's end and server's end, with the cipher, the chunks and the patience of `link`.

    `keys`: 32 bytes for each direction, the client's first. `wrap` may put a tap around each end's transport.
    """
    client_side, server_side = loopback_pair()

    def channel(transport: Any, send: bytes, recv: bytes, peer: str) -> Channel:
        is_plain = link.encryption == "off"
        ciphers = [PlainCipher() if is_plain else make_cipher(link.cipher_library, key) for key in (send, recv)]
        return Channel(
            transport,
            send_cipher=ciphers[0],
            recv_cipher=ciphers[1],
            chunk_bytes=link.chunk_bytes,
            timeout_s=link.timeout_s,
            peer=peer,
        )

    return channel(wrap(client_side), *keys, "server"), channel(wrap(server_side), *keys[::-1], "client")
