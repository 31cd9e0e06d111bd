"""Private keys stay private and are never overwritten; a revoked client stays revoked."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from Crypto.PublicKey import RSA

from hpc.errors import IdentityError
from hpc.link import identity
from hpc.link.identity import Authorised, ensure_local, load_private, load_server_public, make, rotate
from hpc.link.key_files import create

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "keys.py"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_layout_and_permissions(keys_dir: Path) -> None:
    assert mode(keys_dir) == 0o700
    assert sorted(path.name for path in keys_dir.glob("*.key")) == [
        "client-0.key",
        "client-1.key",
        "client-2.key",
        "server.key",
    ]
    assert {mode(path) for path in keys_dir.glob("*.key")} == {0o600}
    assert (keys_dir / "server.pem").exists()
    assert len(list((keys_dir / "authorized_clients").glob("client-*.pem"))) == 3
    for public in [keys_dir / "server.pem", *keys_dir.glob("authorized_clients/*.pem")]:
        assert b"PRIVATE" not in public.read_bytes()


def test_fingerprint_is_the_der_hash_of_the_public_half(keys_dir: Path) -> None:
    server = load_private(keys_dir, "server")
    assert server.fingerprint == identity.fingerprint(identity.load_server_public(keys_dir))
    assert identity.short(server.fingerprint) == f"SHA256:{server.fingerprint[:16]}"
    assert "PRIVATE" not in repr(server)
    assert str(server.key.d) not in repr(server)


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o660])
def test_key_open_to_others_is_refused_with_the_cure(keys_dir: Path, bits: int) -> None:
    path = keys_dir / "client-0.key"
    path.chmod(bits)
    with pytest.raises(IdentityError, match=f"run: chmod 600 {path}"):
        load_private(keys_dir, "client-0")


def test_missing_key_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"python launch/keys\.py make"):
        load_private(tmp_path, "server")


def test_weak_foreign_and_public_keys_are_refused(keys_dir: Path) -> None:
    path = keys_dir / "client-0.key"
    path.write_bytes(RSA.generate(1024).export_key())
    with pytest.raises(IdentityError, match="1024 bits; at least 3072"):
        load_private(keys_dir, "client-0")
    path.write_bytes(b"not a key")
    with pytest.raises(IdentityError, match="holds no RSA key"):
        load_private(keys_dir, "client-0")
    path.write_bytes((keys_dir / "server.pem").read_bytes())
    with pytest.raises(IdentityError, match="public key only"):
        load_private(keys_dir, "client-0")


def test_make_never_overwrites(keys_dir: Path) -> None:
    before = (keys_dir / "client-0.key").read_bytes()
    with pytest.raises(IdentityError, match="exists and stays as it is"):
        make(keys_dir, "client-0")
    assert (keys_dir / "client-0.key").read_bytes() == before
    with pytest.raises(IdentityError, match="exists"):
        create(keys_dir / "server.pem", b"", 0o644)
    assert not list(keys_dir.glob(".*.key.*")), "a draft was left behind"


@pytest.mark.parametrize("name", ["", "client", "client-01", "client--1", "../client-0", "server.key", "client-0\n"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(IdentityError, match="is no identity"):
        make(tmp_path, name)


def test_unknown_and_revoked_differ(keys_dir: Path) -> None:
    one = load_private(keys_dir, "client-1").fingerprint
    assert Authorised.load(keys_dir).lookup(one)[0] == "client-1"
    identity.revoke(keys_dir, "client-1")
    with pytest.raises(IdentityError, match="of client-1 is revoked"):
        Authorised.load(keys_dir).lookup(one)
    with pytest.raises(IdentityError, match="is not authorised"):
        Authorised.load(keys_dir).lookup("0" * 64)
    assert sorted(Authorised.load(keys_dir).by_client_id()) == [0, 2]


def test_revoked_client_stays_revoked(keys_dir: Path) -> None:
    identity.revoke(keys_dir, "client-1")
    assert ensure_local(keys_dir, 3) == []
    (keys_dir / "client-1.key").unlink()
    assert ensure_local(keys_dir, 3) == []
    assert not (keys_dir / "authorized_clients" / "client-1.pem").exists()
    with pytest.raises(IdentityError, match="is revoked; make a new one"):
        identity.authorise(keys_dir, keys_dir / "revoked" / "client-1.pem")


def test_revoked_wins_over_an_authorised_copy(keys_dir: Path) -> None:
    public = (keys_dir / "authorized_clients" / "client-1.pem").read_bytes()
    identity.revoke(keys_dir, "client-1")
    (keys_dir / "authorized_clients" / "client-1.pem").write_bytes(public)
    known = Authorised.load(keys_dir)
    with pytest.raises(IdentityError, match="revoked"):
        known.lookup(load_private(keys_dir, "client-1").fingerprint)
    assert 1 not in known.by_client_id()
    assert identity.revoke(keys_dir, "client-1").name == "client-1.2.pem"


def test_authorise_takes_a_public_key_by_its_file_name(keys_dir: Path, tmp_path: Path) -> None:
    sent = tmp_path / "client-7.pem"
    sent.write_bytes((keys_dir / "server.pem").read_bytes())
    identity.authorise(keys_dir, sent)
    assert 7 in Authorised.load(keys_dir).by_client_id()
    with pytest.raises(IdentityError, match="exists"):
        identity.authorise(keys_dir, sent)
    with pytest.raises(IdentityError, match="is no identity"):
        identity.authorise(keys_dir, tmp_path / "friend.pem")


def test_authorise_keeps_the_private_half_out(keys_dir: Path, tmp_path: Path) -> None:
    private = tmp_path / "client-8.pem"
    private.write_bytes((keys_dir / "client-0.key").read_bytes())
    identity.authorise(keys_dir, private)
    assert b"PRIVATE" not in (keys_dir / "authorized_clients" / "client-8.pem").read_bytes()


def test_rotation_gives_a_new_key_and_refuses_the_old_one(keys_dir: Path) -> None:
    old, public = load_private(keys_dir, "client-1"), keys_dir / "authorized_clients" / "client-1.pem"
    former = public.read_bytes()
    fresh, place = rotate(keys_dir, "client-1")
    assert place == public
    assert fresh.fingerprint != old.fingerprint
    assert load_private(keys_dir, "client-1").fingerprint == fresh.fingerprint
    assert mode(keys_dir / "client-1.key") == 0o600
    known = Authorised.load(keys_dir)
    assert known.lookup(fresh.fingerprint)[0] == "client-1"
    with pytest.raises(IdentityError, match="of client-1 is revoked"):
        known.lookup(old.fingerprint)
    old_private = old.key.export_key(pkcs=8)
    assert all(path.read_bytes().strip() != old_private.strip() for path in keys_dir.rglob("*") if path.is_file())
    public.write_bytes(former)  # even if somebody puts it back
    assert 1 not in Authorised.load(keys_dir).by_client_id()
    assert {path.name for path in keys_dir.glob(".*")} <= {".lock"}, "a draft was left behind"


def test_rotation_of_the_server_is_felt_by_who_pins_the_old_key(keys_dir: Path) -> None:
    former = (keys_dir / "server.pem").read_bytes()
    fresh, _ = rotate(keys_dir, "server")
    assert identity.fingerprint(load_server_public(keys_dir)) == fresh.fingerprint
    (keys_dir / "server.pem").write_bytes(former)
    with pytest.raises(IdentityError, match=r"is the revoked key .*; get the server's new server\.pem"):
        load_server_public(keys_dir)


def test_only_who_has_the_private_key_rotates_it(keys_dir: Path) -> None:
    (keys_dir / "client-2.key").unlink()
    with pytest.raises(IdentityError, match=r"client-2\.key"):
        rotate(keys_dir, "client-2")
    assert (keys_dir / "authorized_clients" / "client-2.pem").exists()


@pytest.mark.parametrize("place", [".", "authorized_clients", "revoked", "authorized_clients/client-1.pem"])
def test_what_others_can_change_is_not_believed(keys_dir: Path, place: str) -> None:
    identity.revoke(keys_dir, "client-2")
    path = keys_dir / place
    path.chmod(path.stat().st_mode | 0o020)
    with pytest.raises(IdentityError, match=r"can be changed by others .* run: chmod go-w"):
        Authorised.load(keys_dir)


def test_a_pinned_server_that_others_can_change_is_not_believed(keys_dir: Path) -> None:
    (keys_dir / "server.pem").chmod(0o646)
    with pytest.raises(IdentityError, match="can be changed by others"):
        load_server_public(keys_dir)
    keys_dir.chmod(0o770)
    with pytest.raises(IdentityError, match=f"run: chmod go-w {keys_dir}"):
        load_private(keys_dir, "client-0")


def test_a_folder_open_to_others_is_said_once(keys_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys_dir.chmod(0o755)
    for _ in range(2):
        load_private(keys_dir, "client-0")
    (record,) = [each for each in caplog.records if "is open to others" in each.message]
    assert f"chmod 700 {keys_dir}" in record.message


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)


def test_script_shows_revokes_and_fails_in_one_line(keys_dir: Path) -> None:
    assert run("revoke", "client-2", "--keys_dir", str(keys_dir)).returncode == 0
    shown = run("show", "--keys_dir", str(keys_dir)).stdout
    assert [line.split()[:2] for line in shown.splitlines()] == [
        ["server", "server"],
        ["authorised", "client-0"],
        ["authorised", "client-1"],
        ["revoked", "client-2"],
    ]
    failed = run("make", "client-0", "--keys_dir", str(keys_dir))
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1


def test_script_rotates_and_tells_whom_to_tell(keys_dir: Path) -> None:
    done = run("rotate", "client-0", "--keys_dir", str(keys_dir))
    assert done.returncode == 0, done.stderr
    fresh = load_private(keys_dir, "client-0").fingerprint
    assert fresh[:16] in done.stdout
    assert "keys.py authorise client-0.pem" in done.stdout
    full = run("show", "--full", "--keys_dir", str(keys_dir)).stdout
    assert ["authorised", "client-0", fresh] in [line.split() for line in full.splitlines()]
    assert ["revoked", "client-0"] in [line.split()[:2] for line in full.splitlines()]


def test_script_makes_keys(tmp_path: Path) -> None:
    made = run("make", "client-4", "--keys_dir", str(tmp_path / "keys"))
    assert made.returncode == 0, made.stderr
    assert load_private(tmp_path / "keys", "client-4").fingerprint[:16] in made.stdout
