"""Secrets stay where they are: in no log, message or repr; compared by the library alone; nothing unsafe is loaded."""

from __future__ import annotations

import ast
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from hpc.checkpoint import write_role
from hpc.cli import make_parser, parse
from hpc.config import Config, LinkConfig, RunConfig
from hpc.errors import ConfigError, HandshakeError, ModelError
from hpc.link import connect, key_exchange
from hpc.link.handshake import Session
from hpc.link.identity import Authorised, load_private
from hpc.link.peers import PeerKeys
from hpc.link.transport import loopback_pair
from hpc.model.shards.safetensors import SafetensorsShard
from hpc.opening import facts_of_run, folder_told
from tests.key_forms import forms, forms_of_key

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*sorted((ROOT / "hpc").rglob("*.py")), *sorted((ROOT / "launch").glob("*.py"))]


def link_up(
    keys: Path, monkeypatch: pytest.MonkeyPatch, facts: dict[str, str] | None = None
) -> tuple[list[Session], list[bytes]]:
    """Both ends' sessions, and every secret that was made on the way. The server tells `facts`."""
    made: list[bytes] = []

    def noting(function: str) -> None:
        original = getattr(key_exchange, function)

        def noted(*arguments: object, **options: object) -> bytes:
            made.append(original(*arguments, **options))
            return made[-1]

        monkeypatch.setattr(key_exchange, function, noted)

    noting("hkdf")
    noting("oaep_open")
    sessions: list[Session] = []
    ends, link = loopback_pair(), LinkConfig(keys_dir=str(keys), timeout_s=10)
    options = {"link": link, "client_id": 0, "agreement": {"version": 1}}
    works = (connect.open_client_channel, partial(connect.open_server_channel, facts=facts))
    threads = [
        threading.Thread(target=lambda end=end, work=work: sessions.append(work(end, **options)[1]))
        for end, work in zip(ends, works, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return sessions, made


def test_no_secret_of_a_link_is_logged_shown_or_put_into_the_environment(
    pristine_keys: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    sessions, made = link_up(pristine_keys, monkeypatch)
    assert len(sessions) == 2
    assert len(made) >= 10, "four keys at each end, and a secret from each"
    shown = [repr(sessions), str(sessions[0]), *(record.getMessage() for record in caplog.records)]
    shown += [f"{name}={value}" for name, value in os.environ.items()] + sys.argv
    assert any("linked to" in each for each in shown), "the log was looked at"
    text = "\n".join(shown).encode()
    secrets = [form for secret in made for form in forms(secret)]
    secrets += [form for path in pristine_keys.glob("*.key") for form in forms_of_key(path)]
    assert all(form in b"before " + form for form in secrets)
    assert not [form for form in secrets if form in text]


def test_a_client_writes_where_the_authenticated_server_says(
    pristine_keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the store says, which anybody who reaches it can write; and its own choice goes first."""
    sessions, _ = link_up(pristine_keys, monkeypatch, facts=facts_of_run(Path("results/runs/one")))
    (client,) = [session for session in sessions if session.peer_name == "server"]
    assert folder_told(client, Config()) == Path("results/runs/one")
    assert folder_told(client, Config(run=RunConfig(output_dir="mine"))) == Path("mine")
    for facts in ({}, {"run.folder": 7}, {"run.folder": ""}):
        with pytest.raises(HandshakeError, match="told no folder"):
            folder_told(replace(client, facts=facts), Config())


def test_objects_that_hold_secrets_do_not_show_them(pristine_keys: Path) -> None:
    me = load_private(pristine_keys, "client-0")
    keys = PeerKeys(0, me, Authorised.load(pristine_keys).by_client_id(), "run")
    text = f"{me!r} {keys!r} {vars(keys)!r} {key_exchange.derive_keys(b'a', b'b', b'c', salt=b'd')!r}".encode()
    assert not [form for form in forms_of_key(pristine_keys / "client-0.key") if form in text]
    assert b"Keys()" in text


def test_a_checkpoint_is_its_owners_alone(tmp_path: Path) -> None:
    """It holds what was learned from private text."""
    before = os.umask(0)
    try:
        write_role(tmp_path, 3, "client-0", {"a": torch.zeros(2)}, {"scale": 1.0})
    finally:
        os.umask(before)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_mode & 0o077 == 0


SECRET = re.compile(r"secret|seed|shared|tag|mac\b|digest|proof|signature|private|(send|recv|session)_key")
# What is public, though it is called so: hashes of public keys, of what is in files, and kinds of the same name.
PUBLIC = re.compile(r"fingerprint|sha256|\.shape|\.dtype|len\(|type\(|transcript_hash|_digest\(|tags\.keys|data\.seed")


def compared(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Compare) and any(isinstance(each, (ast.Eq, ast.NotEq)) for each in node.ops):
            yield ast.unparse(node)


def test_no_secret_is_compared_byte_by_byte() -> None:
    """hmac.compare_digest, or the cipher's own verify, do that in constant time."""
    assert SECRET.search("given_tag == due_tag")
    files = [path for path in SOURCES if "link" in path.parts] + [ROOT / "hpc" / "fellows.py"]
    found = [(path.name, text) for path in files for text in compared(path)]
    assert len(found) > 50, "the comparisons were found"
    suspicious = [each for each in found if SECRET.search(each[1]) and not PUBLIC.search(each[1])]
    assert not suspicious
    masks = (ROOT / "hpc" / "link" / "masks.py").read_text()
    assert "hmac.compare_digest" in masks


BARRED = re.compile(
    r"(pickle|dill|cloudpickle|marshal|shelve|joblib)\.(loads?|open|Unpickler)|yaml\.(load|load_all|unsafe_load\w*|full_load\w*)"
    r"|eval|exec|os\.(system|popen)|tarfile\..*|.*\.extractall|shutil\.unpack_archive"
    r"|dist\.\w*object\w*|torch\.hub\..*"
)


def calls(path: Path) -> Iterator[ast.Call]:
    return (each for each in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(each, ast.Call))


def test_nothing_is_loaded_that_could_run() -> None:
    for word in ("pickle.loads", "yaml.load", "eval", "dist.broadcast_object_list"):
        assert BARRED.fullmatch(word)
    for path in SOURCES:
        for call in calls(path):
            name = ast.unparse(call.func)
            told = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            where = f"{path.relative_to(ROOT)}:{call.lineno} {name}"
            assert not BARRED.fullmatch(name), where
            assert told.get("shell") != "True", where
            assert told.get("allow_pickle") in (None, "False"), where
            assert told.get("trust_remote_code") in (None, "False"), where
            if re.fullmatch(r"Auto\w+\.from_(pretrained|config)", name):  # unless told, transformers asks the user
                assert told.get("trust_remote_code") == "False", where
            if name == "torch.load":
                assert told.get("weights_only") == "True", where
            if name.endswith("load_dataset"):
                assert "trust_remote_code" not in told or told["trust_remote_code"] == "False", where


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system", "!!python/name:os.system", "!!python/object/new:os"]
)
def test_a_configuration_that_names_code_is_refused(tag: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "run.yaml"
    path.write_text(f"run:\n  name: {tag} ['touch {mark}']\n")
    with pytest.raises(ConfigError):
        parse(make_parser("test"), ["--config", str(path)])
    assert not mark.exists()


@pytest.mark.parametrize(
    "header",
    [
        (2**40).to_bytes(8, "little") + b"{}",
        (2**64 - 1).to_bytes(8, "little") + b"{}",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        (40).to_bytes(8, "little") + b'{"a":{"shape":[' + b"9" * 25,
    ],
    ids=["2**40 bytes", "2**64 - 1 bytes", "100,000 lists in lists", "cut short"],
)
def test_a_header_of_weights_is_bounded(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    with pytest.raises(ModelError, match="is not a whole safetensors file"):
        SafetensorsShard(path)
