"""Of what many processes say at a run's end, the cause is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpc.last_words import LAST_WORDS, cause, ending, leave_ending, leave_last_words


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LAST_WORDS, str(tmp_path))
    return tmp_path


def say(words: Path, number: int, role: str, text: str, code: int) -> None:
    assert leave_last_words(role, text, code)
    os.utime(words / f"{role}.txt", (number, number))


def test_bad_input_is_the_cause_of_all_else(words: Path) -> None:
    say(words, 1, "trunk-0", "PeerLost: client 1 is gone", 1)
    say(words, 2, "client-1", "no such file", 2)
    found = cause({"trunk-0": 1, "client-1": 2, "client-0": -9}, words)
    assert (str(found), found.exit_code) == ("client-1: no such file", 2)


def test_the_trunk_knows_more_than_a_client_that_lost_it(words: Path) -> None:
    say(words, 1, "client-0", "PeerLost: the trunk is gone", 1)
    say(words, 2, "trunk-0", "NonFinite: step 3", 1)
    assert str(cause({"client-0": 1, "trunk-0": 1}, words)) == "trunk-0: NonFinite: step 3"


def test_who_was_killed_is_named_before_who_missed_it(words: Path) -> None:
    say(words, 1, "trunk-0", "PeerLost: client 1 is gone", 1)
    found = cause({"trunk-0": 1, "client-1": -9}, words)
    assert str(found) == "killed by SIGKILL (client-1); trunk-0: PeerLost: client 1 is gone"
    assert found.exit_code == 1


def test_nobody_said_anything(words: Path) -> None:
    assert str(cause({"client-0": -9}, words)) == "killed by SIGKILL (client-0)"
    assert "client-0 ended with exit code 3" in str(cause({"client-0": 3}, words))


def test_a_pause_keeps_its_exit_code(words: Path) -> None:
    say(words, 1, "trunk-0", "paused after step 12", 75)
    assert cause({"trunk-0": 75}, words).exit_code == 75


def test_an_ending_is_the_launchers_to_print(words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_ending("run ended: finished")
    assert ending(words) == "run ended: finished"
    assert not capsys.readouterr().out


def test_without_a_launcher_it_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(LAST_WORDS, raising=False)
    assert not leave_last_words("trunk-0", "x", 1)
    leave_ending("run ended: finished")
    assert capsys.readouterr().out == "run ended: finished\n"
    assert ending(tmp_path) is None
