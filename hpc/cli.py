"""The command line: YAML file and dotted flags → a checked `Config`; errors → one line and an exit code.

Submitting or refusing a job must be quick, so nothing here imports torch.
"""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from hpc.config import Config
from hpc.errors import BadInput, ConfigError, HpcError
from hpc.logs import reason
from hpc.quiet import hush
from hpc.undumped import leave_no_core

T = TypeVar("T")


def make_parser(description: str) -> ArgumentParser:
    """A parser with `--config FILE.yaml`, `--print_config`, and every key of `Config` as a dotted flag."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with the same keys as the flags below.")
    for field in fields(Config):
        parser.add_class_arguments(get_type_hints(Config)[field.name], field.name)
    return parser


def parse_quickly(arguments: Sequence[str]) -> Config:
    """`parse` for hundreds of command lines of `--KEY VALUE` that are much alike: each group is read once.

    Raises `ConfigError` as `parse` does.
    """
    of_group: dict[str, list[str]] = {field.name: [] for field in fields(Config)}
    known = set(valid_keys())
    for flag, value in zip(arguments[::2], arguments[1::2], strict=True):
        key = flag.removeprefix("--")
        if key not in known and not any(each.startswith(f"{key}.") for each in known):
            raise ConfigError(f"unknown key {key}{suggestion(key)}")  # the parser takes half a key for one
        of_group[key.partition(".")[0]] += [flag, value]
    return Config(**{name: _group(name, tuple(texts)) for name, texts in of_group.items()})


@cache
def _group(name: str, arguments: tuple[str, ...]) -> Any:
    return parse_class(get_type_hints(Config)[name], name, arguments)


def parse_class(kind: type[T], name: str, arguments: Sequence[str]) -> T:
    """One dataclass from flags that begin with `--name.`. Raises `ConfigError` as `parse` does."""
    parser = _class_parser(cast(Hashable, kind), name)
    try:
        made: T = parser.instantiate(parser.parse_args(list(arguments)))[name]
        return made
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(_one_line(str(error))) from None


@cache
def _class_parser(kind: Any, name: str) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, name)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Config, Namespace]:
    """The checked configuration, and the namespace with any further flags of the parser.

    Raises `ConfigError` in one line: for an unknown key with the nearest valid one.
    """
    try:
        namespace = parser.parse_args(list(arguments))
        groups = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ConfigError(_one_line(str(error))) from None
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(_one_line(f"--config cannot be read: {error}")) from None
    return Config(**{field.name: groups[field.name] for field in fields(Config)}), namespace


@cache
def valid_keys() -> list[str]:
    """All dotted keys of the configuration."""
    return list(_keys_of(Config))


def _keys_of(group: Any, prefix: str = "") -> Iterator[str]:
    kinds = get_type_hints(group)
    for field in fields(group):
        if is_dataclass(kinds[field.name]):
            yield from _keys_of(kinds[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def _one_line(message: str) -> str:
    """jsonargparse explains at length: keep what names the value, the rule and the nearest key."""
    text = re.sub(r"\s+", " ", message).strip()
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return f"unknown key {found[1]}.{found[2]}{suggestion(f'{found[1]}.{found[2]}')}"
    if found := re.search(r"(?:Option '|[Uu]nrecognized arguments: (?:--)?)([\w.]+)", text):
        return f"unknown key {found[1]}{suggestion(found[1])}"
    if found := re.search(r'Parser key "([\w.]+)":.*Expected a (.+?)\. Got value: (.*)$', text):
        choices = re.findall(r"'([^']*)'", found[2]) if "Literal" in found[2] else []
        rule = f"one of {', '.join(choices)}" if choices else found[2].replace("<class '", "").replace("'>", "")
        return f"--{found[1]} is {found[3]}; it must be {rule}"
    if found := re.search(r'Parser key "([\w.]+)":.*Expected a <class .float.> .*NoneType.*Given value: (.*)$', text):
        return f"--{found[1]} is {found[2]}; it must be a number, or null"
    if found := re.search(r"File does not exist: '?([^' ]+)'?", text):
        return f"--config {found[1]} does not exist; give a YAML file"
    return text


def suggestion(key: str) -> str:
    """`; did you mean …?` for the nearest valid key, or where the list of keys is."""
    candidates = valid_keys()
    near = difflib.get_close_matches(key, candidates, n=1, cutoff=0.5)
    if not near:
        tails = {k.rpartition(".")[2]: k for k in candidates}
        near = [tails[t] for t in difflib.get_close_matches(key.rpartition(".")[2], tails, n=1, cutoff=0.6)]
    return f"; did you mean {near[0]}?" if near else "; --help lists the valid keys"


def run_main(main: Callable[[list[str]], int], prefix: str = "error", *, ending: str = "") -> None:
    """Run a script's `main(argv)` and exit: one line for what is foreseen, code 2 for bad input, 1 for the rest.

    `ending`: what that line begins with, instead of `prefix`, where work was under way.
    """
    ending = ending or prefix
    leave_no_core()  # of any program here: it may hold private text as well as keys
    hush()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path with letters that the terminal lacks ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except HpcError as error:
        sys.stderr.write(f"{prefix if error.exit_code == BadInput.exit_code else ending}: {error}\n")
        code = error.exit_code
    except Exception as error:
        traceback.print_exc()
        print(f"{ending}: {reason(error)}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print(f"{ending}: interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # A link's background threads may wait for a peer that is gone; a failed role must not linger.
        os._exit(code)
    sys.exit(0)


def to_yaml(parser: ArgumentParser, namespace: Namespace) -> str:
    """The resolved configuration as YAML that `--config` reads back."""
    text: Any = parser.dump(namespace)
    return str(text)
