"""RSA identities, pinned on both sides as in SSH.

`keys_dir` holds `server.key` and `client-<k>.key` (private, mode 0600), `server.pem` (public),
`authorized_clients/client-<k>.pem` and `revoked/*.pem`. A client is who its file in `authorized_clients` says. What is
in `revoked` is refused by its fingerprint, wherever else it lies. Nothing of this may be writable by others.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from Crypto.PublicKey import RSA
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from hpc.errors import IdentityError
from hpc.link.key_files import create, locked, make_folder, replace, require_unwritable, warn_if_open

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
    require_unwritable(path.parent)
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read()
    except OSError as error:
        raise IdentityError(f"{path}: {error.strerror}; {_HINT}") from None
    if mode & 0o077:
        raise IdentityError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    warn_if_open(path.parent)
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
    """The pinned public key of the server. Raises IdentityError, also if that key was revoked."""
    folder = Path(keys_dir)
    key = _pinned(folder / f"{SERVER}.pem")
    if fingerprint(key) in _revoked(folder):
        raise IdentityError(
            f"{folder / f'{SERVER}.pem'} is the revoked key {short(fingerprint(key))}; get the server's new server.pem"
        )
    return key


@dataclass(kw_only=True, frozen=True)
class Authorised:
    """The clients that may log in, and those that no longer may."""

    clients: dict[str, RSA.RsaKey]
    """Name → public key."""
    revoked: dict[str, str]
    """Fingerprint → name."""

    @classmethod
    def load(cls, keys_dir: str | Path) -> Authorised:
        """Read `authorized_clients` and `revoked`. Raises IdentityError for a file that is no key, or not safe."""
        folder = Path(keys_dir)
        for each in (folder, folder / "authorized_clients", folder / "revoked"):
            require_unwritable(each)
        clients = {path.stem: _pinned(path) for path in sorted((folder / "authorized_clients").glob("*.pem"))}
        return cls(clients=clients, revoked=_revoked(folder))

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
    public = _public_place(folder, name)
    for each in (path, public):
        if each.exists():
            raise IdentityError(f"{each} exists and stays as it is; move it away to make {name} anew")
    make_folder(folder)
    make_folder(public.parent)
    pem = _new_key()
    create(path, pem, 0o600)
    key = RSA.import_key(pem)
    create(public, key.public_key().export_key() + b"\n", 0o644)
    return Identity(name=name, key=key)


def rotate(keys_dir: str | Path, name: str) -> tuple[Identity, Path]:
    """A new identity in the place of `name`'s, whose old one is revoked and its private half gone.

    Returns it, and where its public half lies. Raises IdentityError if there is no private key of that name.
    """
    folder = Path(keys_dir)
    old = load_private(folder, name)
    with locked(folder):
        public, pem = _public_place(folder, name), _new_key()
        # Killed in between: the old one is revoked already, and a second call goes on from there.
        if fingerprint(old.key) not in _revoked(folder):
            target = _revoked_place(folder, name)
            create(target, old.key.public_key().export_key() + b"\n", 0o644)
        replace(folder / f"{name}.key", pem, 0o600)
        make_folder(public.parent)
        key = RSA.import_key(pem)
        replace(public, key.public_key().export_key() + b"\n", 0o644)
    return Identity(name=name, key=key), public


def ensure_local(keys_dir: str | Path, clients: int) -> list[str]:
    """Make the identities of a run on one machine that do not exist in any form; returns the names made.

    A name with a key, an authorised or a revoked file is left alone, so a revoked client stays revoked.
    """
    folder, made = Path(keys_dir), []
    make_folder(folder)
    with locked(folder):
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
    make_folder(folder / "authorized_clients")
    create(folder / "authorized_clients" / f"{name}.pem", key.export_key() + b"\n", 0o644)
    return fingerprint(key)


def revoke(keys_dir: str | Path, name: str) -> Path:
    """Refuse `name` from now on: moves its public key to `revoked/`. Raises IdentityError if it is not authorised.

    For the server that is the key pinned in `server.pem`; whoever has its private half uses `rotate`.
    """
    folder = Path(keys_dir)
    source = _public_place(folder, _checked(name))
    if not source.exists():
        raise IdentityError(f"{source}: no such {'server is pinned' if name == SERVER else 'client is authorised'}")
    return source.rename(_revoked_place(folder, name))


def show(keys_dir: str | Path) -> list[tuple[str, str, str]]:
    """Every public key as (state, name, fingerprint); the states are server, authorised and revoked."""
    folder = Path(keys_dir)
    rows = [("server", SERVER, fingerprint(load_server_public(folder)))] if (folder / f"{SERVER}.pem").exists() else []
    known = Authorised.load(folder)
    rows += [("authorised", name, fingerprint(key)) for name, key in known.clients.items()]
    return rows + [("revoked", name, print_) for print_, name in known.revoked.items()]


def _new_key() -> bytes:
    private = rsa.generate_private_key(65537, RSA_BITS)  # OpenSSL's: some times faster than PyCryptodome's
    return private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _public_place(folder: Path, name: str) -> Path:
    return folder / f"{SERVER}.pem" if name == SERVER else folder / "authorized_clients" / f"{name}.pem"


def _pinned(path: Path) -> RSA.RsaKey:
    require_unwritable(path)
    return load_public(path)


def _revoked(folder: Path) -> dict[str, str]:
    """Fingerprint → name."""
    return {fingerprint(load_public(path)): path.stem for path in sorted((folder / "revoked").glob("*.pem"))}


def _revoked_place(folder: Path, name: str) -> Path:
    """A free one for another revoked key of this name."""
    earlier = len(_revoked_files(folder, name))
    make_folder(folder / "revoked")
    return folder / "revoked" / (f"{name}.{earlier + 1}.pem" if earlier else f"{name}.pem")


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
