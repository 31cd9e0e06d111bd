"""The messages of a handshake: small JSON objects, a running transcript, and refusals with a reason."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from hpc.errors import HandshakeError, IdentityError, LinkError, ProtocolError, TamperError
from hpc.link.cipher import NONCE_BYTES, TAG_BYTES, OpenSSLCipher
from hpc.link.transport import Pending, Transport, peer_words, post_bytes, recv_bytes, wait_all

Value = str | int | float | bool
Agreement = Mapping[str, Value]

_LIMIT = 64 * 2**10  # bytes of a message
_LAST_WORDS_S = 5.0


class Conversation:
    """One end of a handshake, all of it within `timeout_s` seconds."""

    def __init__(self, transport: Transport, timeout_s: float) -> None:
        self._transport, self._deadline = transport, time.monotonic() + timeout_s
        self._transcript = hashlib.sha256()
        self._sent: list[Pending] = []
        self.may_refuse = True
        """False once the peer no longer listens to refusals: it refused itself, or it is through."""

    def digest(self) -> bytes:
        """SHA-256 over every message so far, each with its length in front."""
        return self._transcript.digest()

    def say(self, kind: str, **fields: Value | bytes) -> None:
        """Send a message; bytes travel as base64. Does not wait: the peer may be refusing just now."""
        data = _dump({"kind": kind} | fields)
        self._note(data)
        self._sent += post_bytes(self._transport, data)

    def finish(self) -> None:
        """Wait until everything said has left. Raises PeerLost."""
        wait_all(self._sent, timeout_s=self._left(), what="the end of the handshake")

    def hear(self, expected: str, **types: type) -> dict[str, Any]:
        """The next message's fields, each of its type.

        Raises HandshakeError if it is malformed, PeerLost, and what the peer says if it refuses.
        """
        what = f"the handshake ({expected})"
        try:
            data = recv_bytes(self._transport, limit=_LIMIT, timeout_s=self._left(), what=what)
        except ProtocolError as error:
            raise HandshakeError(str(error)) from None
        self._note(data)
        message = _load(data, what)
        if message.get("kind") == "refusal":
            self.may_refuse = False
            words = f"{self._transport.peer} refuses: {peer_words(str(message.get('reason', '')))}"
            raise IdentityError(words) if message.get("identity") is True else HandshakeError(words)
        if message.get("kind") != expected:
            raise HandshakeError(f"{what}: got {peer_words(str(message.get('kind')), 40)!r} instead")
        return {name: _field(message, name, kind, what) for name, kind in types.items()}

    def say_terms(self, key: bytes, agreement: Agreement, facts: Agreement) -> None:
        """Send both sealed. The key seals only this message, so its nonce may be zero."""
        plain = _dump({"agreement": dict(agreement), "facts": dict(facts)})
        sealed = bytearray(len(plain) + TAG_BYTES)
        OpenSSLCipher(key).seal_into(bytes(NONCE_BYTES), plain, self.digest(), memoryview(sealed))
        self.say("terms", sealed=bytes(sealed))

    def hear_terms(self, key: bytes) -> tuple[dict[str, Value], dict[str, Value]]:
        """The peer's agreement and facts. Raises as `hear`, and HandshakeError if the keys differ."""
        aad, what = self.digest(), "the handshake (terms)"
        sealed = self.hear("terms", sealed=bytes)["sealed"]
        plain = bytearray(max(len(sealed) - TAG_BYTES, 0))
        try:
            OpenSSLCipher(key).open_into(bytes(NONCE_BYTES), sealed, aad, memoryview(plain))
        except TamperError:
            raise HandshakeError(f"{what}: the two ends have different keys, or a message was altered") from None
        message = _load(bytes(plain), what)
        return _values(message, "agreement", what), _values(message, "facts", what)

    @contextlib.contextmanager
    def closing_on_error(self) -> Iterator[None]:
        """Tell the peer why this end refuses it, unless it refused first; then give up the link."""
        try:
            yield
        except (IdentityError, HandshakeError) as error:
            if self.may_refuse:
                self._refuse(str(error), identity=isinstance(error, IdentityError))
            self._transport.close()
            raise
        except BaseException:
            self._transport.close()
            raise

    def _refuse(self, reason: str, *, identity: bool) -> None:
        data = _dump({"kind": "refusal", "identity": identity, "reason": reason[:400]})
        with contextlib.suppress(LinkError):
            wait_all(post_bytes(self._transport, data), timeout_s=min(self._left(), _LAST_WORDS_S), what="a refusal")

    def _note(self, data: bytes) -> None:
        self._transcript.update(len(data).to_bytes(8, "little") + data)

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)


def require_agreement(here: Agreement, there: Agreement, *, peer: str) -> None:
    """Raises HandshakeError naming every key that differs, with both values."""
    differing = [
        f"{peer_words(name, 80)}: here {_shown(here, name)}, there {_shown(there, name)}"
        for name in sorted({*here, *there})
        if _shown(here, name) != _shown(there, name)
    ]
    if differing:
        raise HandshakeError(f"this end and {peer} do not agree: {'; '.join(differing)}")


def _shown(values: Agreement, name: str) -> str:
    return peer_words(str(values[name]), 80) if name in values else "not given"


def _dump(message: Mapping[str, Any]) -> bytes:
    text = {name: base64.b64encode(v).decode() if isinstance(v, bytes) else v for name, v in message.items()}
    return json.dumps(text, separators=(",", ":")).encode()


def _load(data: bytes, what: str) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise HandshakeError(f"{what}: the message is no JSON object; is the peer running this program?")
    return message


def _field(message: dict[str, Any], name: str, kind: type, what: str) -> Any:
    value = message.get(name)
    if kind is bytes and isinstance(value, str):
        with contextlib.suppress(binascii.Error, ValueError):
            return base64.b64decode(value, validate=True)
    elif type(value) is kind:
        return value
    raise HandshakeError(f"{what}: field {name!r} is missing or no {kind.__name__}")


def _values(message: dict[str, Any], name: str, what: str) -> dict[str, Value]:
    values = message.get(name)
    if not isinstance(values, dict) or not all(_plain(value) for value in values.values()):
        raise HandshakeError(f"{what}: {name!r} is missing or has values that are neither text nor numbers")
    return values


def _plain(value: object) -> bool:
    return isinstance(value, (str, bool, int)) or (isinstance(value, float) and not math.isnan(value))
