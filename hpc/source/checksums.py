"""`SHA256SUMS`: a folder's own list of its files' hashes, as `sha256sum` writes and reads it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from hpc.errors import ModelError

LIST_NAME = "SHA256SUMS"
READ_BYTES = 2**20


class Checksums:
    """The expected SHA-256 of each file of a folder; empty where the folder has no list."""

    def __init__(self, folder: Path | None) -> None:
        path = folder / LIST_NAME if folder is not None else None
        self._expected = _parse(path) if path is not None and path.is_file() else {}

    def verify(self, path: Path) -> None:
        """Raise `ModelError` unless the file is as listed. Reads all of it (about 1 s a GB); unlisted ones pass."""
        expected = self._expected.get(path.name)
        if expected is None:
            return
        found = sha256_of(path)
        if found != expected:
            raise ModelError(
                f"{path.name} is not the file that {LIST_NAME} lists: SHA-256 {expected} expected, {found} found; "
                f"fetch it again, or correct {LIST_NAME} if the file was changed on purpose"
            )


def sha256_of(path: Path) -> str:
    """The file's SHA-256 in hexadecimal, computed without holding the file in memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _parse(path: Path) -> dict[str, str]:
    expected = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        entry = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line)
        if entry is not None:
            expected[entry[2]] = entry[1].lower()
        elif line.strip():
            raise ModelError(f"{path.name} line {number} is not 'hash  file' as sha256sum writes it: {line[:80]!r}")
    return expected
