"""RSA identities, pinned on both sides as in SSH.

`keys_dir` holds `server.key` and `client-<k>.key` (private, mode 0600), `server.pem` (public),
`authorized_clients/client-<k>.pem` and `revoked/*.pem`. A client is who its file in `authorized_clients` says.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from Crypto.PublicKey import RSA
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hpc.errors import IdentityError

RSA_BITS = 3072  # 128-bit security, NIST SP 800-57 part 1, table 2
SERVER = "server"
_NAME = re.compile(r"server|client-(0|[1-9][0-9]{0,5})")
_HINT = "make keys with: python launch/keys.py make"


def client_name(client_id: int) -> str:
    """`client-<k>`, the name that client k's key has everywhere."""
    return f"client-{client_id}"


@dataclass(kw_only=True, frozen=True)
class Identity:
    """A private key and the name it goes by."""

    name: str
    key: RSA.RsaKey = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.key)


def fingerprint(key: RSA.RsaKey) -> str:
    """SHA-256 of the public key's DER form (SubjectPublicKeyInfo, RFC 5280), 64 hex digits."""
    return hashlib.sha256(key.public_key().export_key("DER")).hexdigest()


def short(fingerprint_hex: str) -> str:
    """As people compare it: SHA256 and the first 16 digits."""
    return f"SHA256:{fingerprint_hex[:16]}"


def load_private(keys_dir: str | Path, name: str) -> Identity:
    """The identity `name`. Raises IdentityError if it is missing, readable by others or not RSA >= 3072 bits."""
    path = Path(keys_dir) / f"{_checked(name)}.key"
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}; {_HINT}") from None
    if mode & 0o077:
        raise IdentityError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    key = _import(path, data)
    if not key.has_private():
        raise IdentityError(f"{path} holds a public key only; {_HINT}")
    return Identity(name=name, key=key)


def load_public(path: str | Path) -> RSA.RsaKey:
    """A public key. Raises IdentityError if it is missing or not RSA >= 3072 bits."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}; {_HINT}") from None
    return _import(Path(path), data).public_key()


def load_server_public(keys_dir: str | Path) -> RSA.RsaKey:
    """The pinned public key of the server."""
    return load_public(Path(keys_dir) / f"{SERVER}.pem")


@dataclass(kw_only=True, frozen=True)
class Authorised:
    """The clients that may log in, and those that no longer may."""

    clients: dict[str, RSA.RsaKey]
    """Name → public key."""
    revoked: dict[str, str]
    """Fingerprint → name."""

    @classmethod
    def load(cls, keys_dir: str | Path) -> Authorised:
        """Read `authorized_clients` and `revoked`. Raises IdentityError for a file that is no key."""
        folder = Path(keys_dir)
        clients = {path.stem: load_public(path) for path in sorted((folder / "authorized_clients").glob("*.pem"))}
        revoked = {fingerprint(load_public(path)): path.stem for path in sorted((folder / "revoked").glob("*.pem"))}
        return cls(clients=clients, revoked=revoked)

    def lookup(self, fingerprint_hex: str) -> tuple[str, RSA.RsaKey]:
        """Name and key with this fingerprint. Raises IdentityError, differently for revoked and for unknown."""
        if fingerprint_hex in self.revoked:
            raise IdentityError(f"the key {short(fingerprint_hex)} of {self.revoked[fingerprint_hex]} is revoked")
        for name, key in self.clients.items():
            if fingerprint(key) == fingerprint_hex:
                return name, key
        raise IdentityError(f"the key {short(fingerprint_hex)} is not authorised; python launch/keys.py authorise FILE")

    def by_client_id(self) -> dict[int, RSA.RsaKey]:
        """Client id → public key, without the revoked ones; the pinned keys of `hpc.link.peers`."""
        valid = {name: key for name, key in self.clients.items() if fingerprint(key) not in self.revoked}
        return {int(name.split("-")[1]): key for name, key in valid.items() if name != SERVER and _NAME.fullmatch(name)}


def make(keys_dir: str | Path, name: str) -> Identity:
    """Create the identity `name` and put its public half in place. Never overwrites.

    Raises IdentityError if the name is no name or its key exists.
    """
    folder, path = Path(keys_dir), Path(keys_dir) / f"{_checked(name)}.key"
    public = folder / f"{SERVER}.pem" if name == SERVER else folder / "authorized_clients" / f"{name}.pem"
    for each in (path, public):
        if each.exists():
            raise IdentityError(f"{each} exists and stays as it is; move it away to make {name} anew")
    _make_folder(folder)
    _make_folder(public.parent)
    private = rsa.generate_private_key(65537, RSA_BITS)  # OpenSSL's: some times faster than PyCryptodome's
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    _create(path, pem, 0o600)
    key = RSA.import_key(pem)
    _create(public, key.public_key().export_key() + b"\n", 0o644)
    return Identity(name=name, key=key)


def ensure_local(keys_dir: str | Path, clients: int) -> list[str]:
    """Make the identities of a run on one machine that do not exist in any form; returns the names made.

    A name with a key, an authorised or a revoked file is left alone, so a revoked client stays revoked.
    """
    folder, made = Path(keys_dir), []
    _make_folder(folder)
    with _locked(folder):
        for name in (SERVER, *map(client_name, range(clients))):
            places = (f"{name}.key", f"{name}.pem", f"authorized_clients/{name}.pem")
            if not any((folder / place).exists() for place in places) and not _revoked_files(folder, name):
                make(folder, name)
                made.append(name)
    return made


def authorise(keys_dir: str | Path, file: str | Path) -> str:
    """Let the client whose public key is in `file` (named client-<k>.pem) log in; returns its fingerprint.

    Raises IdentityError if the file is no such key, the name is taken, or the key was revoked.
    """
    name = _checked(Path(file).stem)
    key = load_public(file)
    folder = Path(keys_dir)
    if name == SERVER:
        raise IdentityError(f"{file}: clients are authorised, the server is pinned by its server.pem")
    if fingerprint(key) in Authorised.load(folder).revoked:
        raise IdentityError(f"{file}: the key {short(fingerprint(key))} is revoked; make a new one")
    _make_folder(folder / "authorized_clients")
    _create(folder / "authorized_clients" / f"{name}.pem", key.export_key() + b"\n", 0o644)
    return fingerprint(key)


def revoke(keys_dir: str | Path, name: str) -> Path:
    """Refuse `name` from now on: moves its public key to `revoked/`. Raises IdentityError if it is not authorised."""
    folder = Path(keys_dir)
    source = folder / "authorized_clients" / f"{_checked(name)}.pem"
    if not source.exists():
        raise IdentityError(f"{source}: no such client is authorised")
    earlier = len(_revoked_files(folder, name))
    target = folder / "revoked" / (f"{name}.{earlier + 1}.pem" if earlier else f"{name}.pem")
    target.parent.mkdir(mode=0o700, exist_ok=True)
    return source.rename(target)


def show(keys_dir: str | Path) -> list[tuple[str, str, str]]:
    """Every public key as (state, name, fingerprint); the states are server, authorised and revoked."""
    folder = Path(keys_dir)
    rows = [("server", SERVER, fingerprint(load_server_public(folder)))] if (folder / f"{SERVER}.pem").exists() else []
    known = Authorised.load(folder)
    rows += [("authorised", name, fingerprint(key)) for name, key in known.clients.items()]
    return rows + [("revoked", name, print_) for print_, name in known.revoked.items()]


def _revoked_files(folder: Path, name: str) -> list[Path]:
    return [*folder.glob(f"revoked/{name}.pem"), *folder.glob(f"revoked/{name}.*.pem")]


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise IdentityError(f"{name!r} is no identity; use 'server' or 'client-<k>', as in client-0")
    return name


def _import(path: Path, data: bytes) -> RSA.RsaKey:
    try:
        key = RSA.import_key(data)
    except (ValueError, IndexError, TypeError):
        raise IdentityError(f"{path} holds no RSA key in PEM form; {_HINT}") from None
    if key.size_in_bits() < RSA_BITS:
        raise IdentityError(f"{path} has {key.size_in_bits()} bits; at least {RSA_BITS} are needed; {_HINT}")
    return key


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise IdentityError(f"{folder} cannot be made ({error.strerror}); choose another --link.keys_dir") from None


def _create(path: Path, data: bytes, mode: int) -> None:
    """Write a new file that nobody sees half-written, with `mode` from its first moment. Raises IdentityError."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.link(draft, path)  # fails, rather than replaces, if the file exists
        finally:
            draft.unlink()
    except FileExistsError:
        raise IdentityError(f"{path} exists and stays as it is") from None
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}") from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks. Raises IdentityError if it cannot be written."""
    try:
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise IdentityError(f"{folder} cannot be written ({error.strerror}); choose another --link.keys_dir") from None
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
