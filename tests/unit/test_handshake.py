"""Both ends prove who they are and agree, or both say why not; nothing else happens."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import LinkConfig
from hpc.errors import HandshakeError, HpcError, IdentityError, PeerLost
from hpc.link import identity
from hpc.link.connect import open_client_channel, open_server_channel
from hpc.link.frame import Header, Kind
from hpc.link.handshake import Session, client_handshake, server_handshake
from hpc.link.identity import Authorised, load_private, load_server_public
from hpc.link.key_exchange import Ephemeral
from hpc.link.transport import Pending, loopback_pair, post_bytes

AGREEMENT = {"version": "0.1", "model.head_blocks": 1, "scale": 0.1, "train.secure": True}
Outcome = Session | HpcError


class Between:
    """Passes a transport's messages on, changed by `change(number, bytes)`."""

    short_messages = True
    name = "between"

    def __init__(self, inner: Any, change: Callable[[int, bytes], bytes]) -> None:
        self.inner, self.peer, self.change, self.count = inner, inner.peer, change, 0

    def send(self, buffer: torch.Tensor) -> Pending:
        data = self.change(self.count, bytes(buffer.numpy()))
        self.count += 1
        return self.inner.send(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def recv(self, buffer: torch.Tensor) -> Pending:
        return self.inner.recv(buffer)

    def close(self) -> None:
        self.inner.close()


def shake(
    folder: Path,
    *,
    client: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    client_change: Callable[[int, bytes], bytes] | None = None,
    server_change: Callable[[int, bytes], bytes] | None = None,
) -> tuple[Outcome, Outcome]:
    """What the client's and the server's end came to, a session or an error."""
    here, there = loopback_pair("client-0", "server")
    of_client = {
        "identity": load_private(folder, "client-0"),
        "server_public": load_server_public(folder),
        "client_id": 0,
        "agreement": AGREEMENT,
        "timeout_s": 5.0,
        "facts": {"examples": 12},
    } | (client or {})
    of_server = {
        "identity": load_private(folder, "server"),
        "authorised": Authorised.load(folder),
        "expected_client_id": 0,
        "agreement": AGREEMENT,
        "timeout_s": 5.0,
    } | (server or {})
    outcomes: dict[str, Outcome] = {}

    def run(name: str, work: Callable[..., Session], transport: Any, change: Any, arguments: dict[str, Any]) -> None:
        try:
            outcomes[name] = work(Between(transport, change) if change else transport, **arguments)
        except HpcError as error:
            outcomes[name] = error

    jobs = [
        ("client", client_handshake, here, client_change, of_client),
        ("server", server_handshake, there, server_change, of_server),
    ]
    threads = [threading.Thread(target=run, args=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return outcomes["client"], outcomes["server"]


def sessions(outcome: tuple[Outcome, Outcome]) -> tuple[Session, Session]:
    for each in outcome:
        assert isinstance(each, Session), each
    return outcome  # type: ignore[return-value]


def test_both_ends_get_matching_keys_names_and_facts(pristine_keys: Path) -> None:
    client, server = sessions(shake(pristine_keys))
    assert client.send_key == server.recv_key
    assert client.recv_key == server.send_key
    assert client.send_key != client.recv_key
    assert len(client.send_key) == 32
    assert (client.peer_name, server.peer_name) == ("server", "client-0")
    assert client.transcript_hash == server.transcript_hash
    assert server.facts == {"examples": 12}
    assert client.facts == {}
    assert repr(client.send_key) not in repr(client)
    assert "send_key" not in repr(client)


def test_every_handshake_gives_other_keys(pristine_keys: Path) -> None:
    assert sessions(shake(pristine_keys))[0].send_key != sessions(shake(pristine_keys))[0].send_key


def test_given_randomness_fixes_the_keys(pristine_keys: Path) -> None:
    """Randomness can be passed in; so nothing else decides the keys."""

    def fixed(seed: int) -> dict[str, Any]:
        state = torch.Generator().manual_seed(seed)
        return {
            "random_bytes": lambda size: bytes(
                torch.randint(0, 256, (size,), generator=state, dtype=torch.uint8).numpy()
            )
        }

    one = sessions(shake(pristine_keys, client=fixed(1), server=fixed(2)))
    two = sessions(shake(pristine_keys, client=fixed(1), server=fixed(2)))
    assert one == two


def refused(outcome: tuple[Outcome, Outcome], error: type[HpcError], text: str) -> None:
    """Both ends raise `error` about `text`."""
    for end, result in zip(("client", "server"), outcome, strict=True):
        assert type(result) is error, f"{end}: {result!r}"
        assert text in str(result), f"{end}: {result}"
        assert "\n" not in str(result)


def test_unknown_client(keys_dir: Path) -> None:
    (keys_dir / "authorized_clients" / "client-0.pem").unlink()
    refused(shake(keys_dir), IdentityError, "is not authorised")


def test_revoked_client(keys_dir: Path) -> None:
    identity.revoke(keys_dir, "client-0")
    refused(shake(keys_dir), IdentityError, "of client-0 is revoked")


def test_server_other_than_the_pinned_one(pristine_keys: Path) -> None:
    pinned = {"server_public": load_private(pristine_keys, "client-2").key.public_key()}
    refused(shake(pristine_keys, client=pinned), IdentityError, "is pinned")


def test_server_that_shows_the_pinned_key_without_having_it(pristine_keys: Path) -> None:
    class Impostor(identity.Identity):
        fingerprint = load_private(pristine_keys, "server").fingerprint  # type: ignore[assignment]

    impostor = Impostor(name="server", key=load_private(pristine_keys, "client-2").key)
    client, server = shake(pristine_keys, server={"identity": impostor})
    assert isinstance(client, IdentityError) or isinstance(server, IdentityError)
    assert not isinstance(client, Session)
    assert not isinstance(server, Session)


def test_client_that_shows_an_authorised_key_without_having_it(pristine_keys: Path) -> None:
    class Impostor(identity.Identity):
        fingerprint = load_private(pristine_keys, "client-0").fingerprint  # type: ignore[assignment]

    impostor = Impostor(name="client-0", key=load_private(pristine_keys, "client-2").key)
    refused(shake(pristine_keys, client={"identity": impostor}), IdentityError, "signature of client-0 does not fit")


def test_key_of_another_client_cannot_log_in(pristine_keys: Path) -> None:
    other = {"identity": load_private(pristine_keys, "client-1")}
    refused(shake(pristine_keys, client=other), IdentityError, "is client-1's; it cannot log in as client 0")
    refused(
        shake(pristine_keys, client=other | {"client_id": 1}), IdentityError, "client-1 came to the link of client-0"
    )


def test_differing_agreement_names_each_key_with_both_values(pristine_keys: Path) -> None:
    theirs = {"version": "0.1", "model.head_blocks": 2, "scale": 0.1, "extra": "x"}
    client, server = shake(pristine_keys, server={"agreement": theirs})
    assert type(client) is type(server) is HandshakeError
    for part in ("model.head_blocks: here 1, there 2", "train.secure: here True, there not given"):
        assert part in str(client)
    for part in ("model.head_blocks: here 2, there 1", "extra: here x, there not given"):
        assert part in str(server)
    assert "scale" not in str(client) + str(server)


def altered(name: str, replace: Callable[[str], Any], kind: str) -> Callable[[int, bytes], bytes]:
    """Changes one field of one message on its way."""

    def change(_: int, data: bytes) -> bytes:
        if not data.startswith(b"{"):
            return data
        message = json.loads(data)
        if message["kind"] != kind or name not in message:
            return data
        message[name] = replace(message[name])
        return json.dumps(message, separators=(",", ":")).encode()

    return change


def flipped(text: str) -> str:
    return ("B" if text[5] == "A" else "A").join((text[:5], text[6:]))


@pytest.mark.parametrize(
    ("side", "kind", "name"),
    [
        ("client", "hello", "x25519"),
        ("client", "secret", "wrapped"),
        ("client", "proof", "signature"),
        ("client", "terms", "sealed"),
        ("server", "hello", "x25519"),
        ("server", "hello", "wrapped"),
        ("server", "proof", "signature"),
        ("server", "terms", "sealed"),
    ],
)
def test_message_altered_on_the_way_ends_it(pristine_keys: Path, side: str, kind: str, name: str) -> None:
    change = altered(name, flipped, kind)
    client, server = shake(pristine_keys, **{f"{side}_change": change})  # type: ignore[arg-type]
    # The last message's sender has done its part and cannot know; every other alteration stops both.
    ends = [client] if (side, kind) == ("server", "terms") else [client, server]
    for end in ends:
        assert isinstance(end, (IdentityError, HandshakeError)), end


def test_other_protocol_names_both_versions(pristine_keys: Path) -> None:
    outcome = shake(pristine_keys, client_change=altered("protocol", lambda _: 9, "hello"))
    refused(outcome, HandshakeError, "link protocol: here 1, there 9")


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.1", b"[" * 50_000, b"[]", b"\xff\xfe", b'{"kind":"hello"}', b'{"kind":"hello","protocol":true}'],
)
def test_junk_is_a_handshake_error(pristine_keys: Path, junk: bytes) -> None:
    here, there = loopback_pair()
    post_bytes(here, junk)
    with pytest.raises(HandshakeError, match="the handshake"):
        server_handshake(
            there,
            identity=load_private(pristine_keys, "server"),
            authorised=Authorised.load(pristine_keys),
            expected_client_id=0,
            agreement={},
            timeout_s=0.5,
        )


def test_refusal_is_shown_as_the_peers_words_in_one_short_line(pristine_keys: Path) -> None:
    words = "no\n\x1b[31m" + "x" * 5000
    here, there = loopback_pair("client", "server")
    refusal = json.dumps({"kind": "refusal", "identity": True, "reason": words}).encode()
    post_bytes(there, refusal)
    with pytest.raises(IdentityError, match=r"^server refuses: no  \[31mx+…$") as caught:
        client_handshake(
            here,
            identity=load_private(pristine_keys, "client-0"),
            server_public=load_server_public(pristine_keys),
            client_id=0,
            agreement={},
            timeout_s=5.0,
        )
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("side", ["client", "server"])
def test_silent_peer_is_lost_in_time(pristine_keys: Path, side: str) -> None:
    here, there = loopback_pair()
    of_client = {"server_public": load_server_public(pristine_keys), "client_id": 0}
    of_server = {"authorised": Authorised.load(pristine_keys), "expected_client_id": 0}
    work: Callable[..., Session]
    work, transport, arguments, name = (
        (server_handshake, there, of_server, "server")
        if side == "server"
        else (client_handshake, here, of_client, "client-0")
    )
    own = load_private(pristine_keys, name)
    start = time.monotonic()
    with pytest.raises(PeerLost, match=r"0\.\d s of waiting for the handshake \(hello\)"):
        work(transport, identity=own, agreement={}, timeout_s=0.3, **arguments)
    assert time.monotonic() - start < 2.0


def test_unusable_x25519_keys_are_refused() -> None:
    for public in (bytes(32), b"\1" + bytes(31), b"short", b""):
        with pytest.raises(HandshakeError, match="unusable"):
            Ephemeral(lambda size: b"\7" * size).agree(public)


def open_both(folder: Path, client: LinkConfig, server: LinkConfig) -> list[Any]:
    here, there = loopback_pair("client-0", "server")
    results: list[Any] = [None, None]

    def run(place: int, work: Callable[..., Any], transport: Any, link: LinkConfig) -> None:
        try:
            results[place] = work(transport, link=link, client_id=0, agreement=AGREEMENT)[0]
        except HpcError as error:
            results[place] = error

    threads = [
        threading.Thread(target=run, args=(0, open_client_channel, here, client)),
        threading.Thread(target=run, args=(1, open_server_channel, there, server)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return results


@pytest.mark.parametrize("encryption", ["aes-256-gcm", "off"])
def test_opened_channels_carry_frames_and_off_is_loud(
    pristine_keys: Path, encryption: Any, caplog: pytest.LogCaptureFixture
) -> None:
    link = LinkConfig(keys_dir=str(pristine_keys), encryption=encryption, timeout_s=5)
    with caplog.at_level(logging.WARNING, logger="hpc.link"):
        client, server = open_both(pristine_keys, link, link)
    client.send(Header(kind=Kind.SMASHED), torch.ones(3))
    assert torch.equal(server.recv(Kind.SMASHED).tensor, torch.ones(3))
    assert ("ENCRYPTION IS OFF" in caplog.text) == (encryption == "off")


def test_one_end_alone_cannot_switch_encryption_off(pristine_keys: Path) -> None:
    on = LinkConfig(keys_dir=str(pristine_keys), timeout_s=5)
    off = LinkConfig(keys_dir=str(pristine_keys), timeout_s=5, encryption="off")
    client, server = open_both(pristine_keys, off, on)
    assert type(client) is type(server) is HandshakeError
    assert "link.encryption: here off, there aes-256-gcm" in str(client)
