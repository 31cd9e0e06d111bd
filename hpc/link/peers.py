"""From client to client through a server that cannot open it.

Each client signs an X25519 key with its RSA identity; the server passes these keys on but cannot replace one, since
clients pin each other's RSA keys. Each pair and direction has its own AES-256-GCM key and counts its messages.
A sealed message: counter (8 bytes, little-endian), then safetensors bytes sealed under that counter.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping

import torch
from Crypto.PublicKey import RSA
from safetensors import SafetensorError
from safetensors.torch import load, save

from hpc.errors import IdentityError, ProtocolError, ReplayError, TamperError
from hpc.link.cipher import TAG_BYTES, NonceCounter, OpenSSLCipher
from hpc.link.frame import payload_view
from hpc.link.identity import Identity, client_name
from hpc.link.key_exchange import Ephemeral, RandomBytes, derive, sign, verify

_COUNTER_BYTES = 8
_MAX_MESSAGE = 8192  # bytes of a signed public key


class SignedEphemeral:
    """A client's X25519 key for one run, signed by its RSA identity."""

    def __init__(self, *, client_id: int, run_id: str, public: bytes, signature: bytes) -> None:
        self.client_id, self.run_id, self.public, self.signature = client_id, run_id, public, signature

    def digest(self) -> bytes:
        """What the signature is over: each part with its length, so that no two contents read alike."""
        parts = (str(self.client_id).encode(), self.run_id.encode(), self.public)
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)

    def to_bytes(self) -> bytes:
        fields = {
            "client_id": self.client_id,
            "run_id": self.run_id,
            "x25519": base64.b64encode(self.public).decode(),
            "signature": base64.b64encode(self.signature).decode(),
        }
        return json.dumps(fields, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> SignedEphemeral:
        """Parses without trusting. Raises IdentityError."""
        try:
            if len(data) > _MAX_MESSAGE:
                raise ValueError
            fields = json.loads(data)
            client_id, run_id = fields["client_id"], fields["run_id"]
            public, signature = (base64.b64decode(fields[name], validate=True) for name in ("x25519", "signature"))
            if type(client_id) is not int or type(run_id) is not str:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
            raise IdentityError("a client's public key came through the server in no known form") from None
        return cls(client_id=client_id, run_id=run_id, public=public, signature=signature)


class _Pair:
    """Keys and counters with one other client."""

    def __init__(self, shared: bytes, *, public: bytes, mine: int, theirs: int, run_id: str) -> None:
        salt = hashlib.sha256(run_id.encode()).digest()
        self.public = public
        lower, higher = sorted((mine, theirs))
        self.secret = derive(shared, salt=salt, purpose=f"pair {lower} and {higher}")
        self.send_cipher = OpenSSLCipher(derive(shared, salt=salt, purpose=f"peer {mine} to {theirs}"))
        self.recv_cipher = OpenSSLCipher(derive(shared, salt=salt, purpose=f"peer {theirs} to {mine}"))
        self.send_nonces, self.recv_nonces = NonceCounter(), NonceCounter()


class PeerKeys:
    """This client's keys with every other client of the run."""

    def __init__(
        self,
        client_id: int,
        identity: Identity,
        authorised: Mapping[int, RSA.RsaKey],
        run_id: str,
        *,
        random_bytes: RandomBytes = os.urandom,
    ) -> None:
        """`authorised`: client id → pinned public key, as `Authorised.by_client_id` gives it."""
        self._client_id, self._authorised, self._run_id = client_id, authorised, run_id
        self._ephemeral = Ephemeral(random_bytes)
        self._pairs: dict[int, _Pair] = {}
        self._former: set[bytes] = set()
        self._used: set[str] = set()
        mine = SignedEphemeral(client_id=client_id, run_id=run_id, public=self._ephemeral.public, signature=b"")
        mine.signature = sign(identity.key, mine.digest(), "peer key", random_bytes)
        self._message = mine.to_bytes()

    def public_message(self) -> bytes:
        """What the other clients `add`."""
        return self._message

    def add(self, message: bytes) -> int:
        """Take up another client's key; returns its id. A client that came back replaces its former key.

        Raises IdentityError unless the pinned identity signed it for this run, ReplayError for a replaced key:
        taking it up again would begin its counters anew.
        """
        key = SignedEphemeral.from_bytes(message)
        name = client_name(key.client_id)
        if key.client_id == self._client_id:
            raise IdentityError(f"{name} is this client itself; its key came back as another client's")
        if key.client_id not in self._authorised:
            raise IdentityError(f"no key of {name} is pinned in authorized_clients")
        if key.run_id != self._run_id:
            raise IdentityError(f"{name} signed its key for another run")
        verify(self._authorised[key.client_id], key.digest(), "peer key", key.signature, who=name)
        present = self._pairs.get(key.client_id)
        if present is not None and present.public == key.public:
            return key.client_id
        if key.public in self._former:
            raise ReplayError(f"an earlier key of {name} came again")
        if present is not None:
            self._former.add(present.public)
        shared = self._ephemeral.agree(key.public)
        self._pairs[key.client_id] = _Pair(
            shared, public=key.public, mine=self._client_id, theirs=key.client_id, run_id=self._run_id
        )
        return key.client_id

    def pair_secret(self, other: int, purpose: str) -> bytes:
        """32 bytes for one purpose, the same at `other` and known to nobody else; other ones in every run.

        Raises IdentityError without its key.
        """
        if other not in self._pairs:
            name, own = client_name(other), client_name(self._client_id)
            raise IdentityError(f"masks missing in a secure round: {name} has not given its key to {own}")
        return derive(self._pairs[other].secret, salt=b"", purpose=purpose)  # bound to the run by its own salt

    def use_once(self, purpose: str) -> None:
        """Notes what must not serve twice under these keys. Raises ReplayError the second time."""
        if purpose in self._used:
            raise ReplayError(f"{client_name(self._client_id)} used the {purpose} before; a new round has a new number")
        self._used.add(purpose)

    def seal(self, to: int, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The tensors for client `to`: one uint8 CPU tensor. Raises IdentityError without its key."""
        pair = self._pair(to)
        # Copies: safetensors refuses tensors that share memory, as tied or flattened parameters do.
        dense = torch.contiguous_format
        copies = {name: tensor.detach().cpu().clone(memory_format=dense) for name, tensor in tensors.items()}
        plain, nonce = save(copies), pair.send_nonces.current()
        sealed = torch.empty(_COUNTER_BYTES + len(plain) + TAG_BYTES, dtype=torch.uint8)
        view = payload_view(sealed)
        view[:_COUNTER_BYTES] = pair.send_nonces.count.to_bytes(_COUNTER_BYTES, "little")
        pair.send_cipher.seal_into(nonce, plain, self._aad(self._client_id, to), view[_COUNTER_BYTES:])
        pair.send_nonces.advance()
        return sealed

    def open(self, frm: int, sealed: torch.Tensor) -> dict[str, torch.Tensor]:
        """What client `frm` sealed for this one.

        Raises ReplayError (again, or one is missing), TamperError (altered, or not from `frm`), ProtocolError.
        """
        pair, view = self._pair(frm), payload_view(sealed)
        name, due = client_name(frm), pair.recv_nonces.count
        if len(view) < _COUNTER_BYTES + TAG_BYTES:
            raise TamperError(f"a hand-over of {name} has {len(view)} bytes: truncated")
        number = int.from_bytes(view[:_COUNTER_BYTES], "little")
        if number != due:
            raise ReplayError(f"hand-over {number} of {name} came where {due} was due")
        plain = bytearray(len(view) - _COUNTER_BYTES - TAG_BYTES)
        try:
            aad, nonce = self._aad(frm, self._client_id), pair.recv_nonces.current()
            pair.recv_cipher.open_into(nonce, view[_COUNTER_BYTES:], aad, memoryview(plain))
        except TamperError as error:
            raise TamperError(f"hand-over {number} of {name}: {error}") from None
        pair.recv_nonces.advance()
        try:
            return load(bytes(plain))
        except (SafetensorError, KeyError, ValueError):
            raise ProtocolError(f"hand-over {number} of {name} is no safetensors content") from None

    def _pair(self, other: int) -> _Pair:
        if other not in self._pairs:
            raise IdentityError(f"{client_name(other)} has not given its key to {client_name(self._client_id)}")
        return self._pairs[other]

    def _aad(self, frm: int, to: int) -> bytes:
        return f"{frm} {to} {self._run_id}".encode()
