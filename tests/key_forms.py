"""How a secret may look where it has leaked: raw, in hex, in base64, as a number, as Python shows bytes."""

from __future__ import annotations

import base64
from pathlib import Path

from Crypto.PublicKey import RSA

LENGTH = 24  # bytes of a form that are looked for; enough to match nothing by accident


def forms(secret: bytes) -> list[bytes]:
    """Each as the first bytes that any copy of the secret in that form would have."""
    made = [secret, secret.hex().encode(), secret.hex().upper().encode(), base64.b64encode(secret)]
    made += [base64.urlsafe_b64encode(secret), repr(secret).encode()[2:-1], str(int.from_bytes(secret, "big")).encode()]
    return sorted({form[:LENGTH] for form in made})


def forms_of_key(path: Path) -> list[bytes]:
    """Of the private numbers of an RSA key, and of the lines of its file."""
    key = RSA.import_key(path.read_bytes())
    numbers = [each.to_bytes((each.bit_length() + 7) // 8, "big") for each in (key.d, key.p, key.q)]
    lines = path.read_bytes().split(b"\n")[2:-3]  # without the first, which all keys begin alike with
    return [form for number in numbers for form in forms(number)] + [line[:LENGTH] for line in lines]
