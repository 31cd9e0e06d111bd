"""Sections of a preset's YAML, each checked where it stands: its keys, its lists, its flags. Pure.

What is wrong is raised as `ValueError` whose text names the place; `hpc.reproduce.preset` names the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

NAME = re.compile(r"[\w+-][\w.+-]*")


def section(content: object, where: str, kind: Any, *, aside: tuple[str, ...] = ()) -> Mapping[str, Any]:
    """A mapping whose keys are the fields of the dataclass `kind` but those `aside`; the ones with a default, and those
    that may be null, can be missing.
    """
    found, known = mapping(content, where), [field for field in fields(kind) if field.name not in aside]
    names = [field.name for field in known]
    for key in found:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            raise ValueError(f"{where} has an unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    for field in known:
        if field.name not in found and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{where} lacks the key {field.name!r}")
    return found


def mapping(content: object, where: str) -> Mapping[str, Any]:
    """A mapping from names that can be part of a file's name."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping, not {content!r:.40}")
    for key in content:
        if not isinstance(key, str) or not NAME.fullmatch(key):
            raise ValueError(f"{where}: {key!r} is no name; use letters, digits, '.', '_', '+' and '-'")
    return content


def cuts(content: object, where: str) -> dict[int, float | None]:
    """Numbers of blocks → norms above 0, or none."""
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where} must be a mapping from numbers of blocks to norms, not {content!r:.40}")
    content = {
        int(key) if str(key).isdecimal() else key: norm for key, norm in content.items()
    }  # JSON's keys are texts
    for blocks, norm in content.items():
        if type(blocks) is not int or blocks < 0:
            raise ValueError(f"{where}: {blocks!r} is no number of blocks; give 0, 1, …")
        if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm > 0):
            raise ValueError(f"{where}.{blocks} is {norm!r}; a norm to clip to must be a number above 0")
    return {blocks: None if norm is None else float(norm) for blocks, norm in content.items()}


def flags(content: object, where: str) -> dict[str, Any]:
    """Keys of the configuration → their values. Whether there is such a key, the configuration tells."""
    found = dict(mapping({} if content is None else content, where))
    for key, value in found.items():
        if not _is_plain(value):
            raise ValueError(f"{where}: {key} is {value!r:.40}; it must be text, a number, a truth value or a list")
    return found


def names(content: object, where: str) -> tuple[str, ...]:
    """A list of names, none of them twice."""
    if not isinstance(content, list) or not content or not all(isinstance(each, str) for each in content):
        raise ValueError(f"{where} must be a list of names, not {content!r:.40}")
    if len(set(content)) < len(content):
        raise ValueError(f"{where} has a name twice: {', '.join(content)}")
    return tuple(content)


def seeds(content: object, where: str) -> tuple[int, ...]:
    """A list of whole numbers from 0 on."""
    if not isinstance(content, list) or not content or not all(type(each) is int and each >= 0 for each in content):
        raise ValueError(f"{where} must be a list of whole numbers from 0 on, not {content!r:.40}")
    return tuple(dict.fromkeys(content))


def at_least_one(content: object, where: str) -> int:
    if type(content) is not int or content < 1:
        raise ValueError(f"{where} is {content!r:.40}; it must be a whole number of at least 1")
    return content


def rates(content: object, where: str) -> tuple[float, ...]:
    """A list of numbers above 0."""
    try:
        found = tuple(map(float, content if isinstance(content, list) else ()))
    except (TypeError, ValueError):
        found = ()
    if not found or min(found) <= 0:
        raise ValueError(f"{where} must be a list of learning rates above 0, not {content!r:.60}")
    return found


def _is_plain(value: object) -> bool:
    """Whether JSON and the command line have it."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str | int) and _is_plain(each) for key, each in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float | None)
