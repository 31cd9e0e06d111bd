"""One form of line, one file a role, and a last line that says why: nothing private in it, and no run lost for it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc import logs
from hpc.errors import ConfigError, DataError, Paused, PeerLost
from hpc.last_words import LAST_WORDS

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3} (INFO|WARNING|ERROR) client-1 (.*)")
log = logging.getLogger("hpc")


@pytest.fixture
def role(capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    """This process as client-1 of a run whose roles share a terminal; its handlers are gone afterwards."""
    logs.set_up("client-1", mixed=True)
    yield "client-1"
    assert logs._now is not None
    for handler in (logs._now.file, logs._now.terminal):
        logging.getLogger().removeHandler(handler)
        handler.close()
    logs._now = None


def lines(folder: Path) -> list[str]:
    return (folder / "logs" / "client-1.log").read_text().splitlines()


def test_lines_wait_for_the_run_to_write_and_then_are_there_at_once(role: str, tmp_path: Path) -> None:
    log.info("first")
    assert not any(tmp_path.iterdir())
    logs.begin_file(tmp_path)
    log.info("second")
    assert [found[2] for line in lines(tmp_path) if (found := LINE.fullmatch(line))] == ["first", "second"]


def test_a_resumed_run_appends(role: str, tmp_path: Path) -> None:
    for word in ("first", "second"):
        logs.set_up(role, mixed=False)
        logs.begin_file(tmp_path)
        log.info(word)
    assert [line.split()[-1] for line in lines(tmp_path)] == ["first", "second"]


def test_no_message_can_pose_as_a_line_or_steer_a_terminal(role: str, tmp_path: Path) -> None:
    logs.begin_file(tmp_path)
    log.warning("lost: %s", "gone\n2026-01-01 00:00:00.000 INFO trunk-0 all is well \x1b[2J")
    found = lines(tmp_path)
    assert len(found) == 2
    assert all(LINE.fullmatch(line) for line in found)
    assert "\x1b" not in "".join(found)


def test_the_terminal_hears_warnings_and_the_file_everything(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.begin_file(tmp_path)
    log.info("quiet")
    log.warning("loud")
    logging.getLogger("somebody.else").info("chatter")
    logs.ended_well("finished")
    (said,) = capsys.readouterr().err.splitlines()
    assert LINE.fullmatch(said)
    assert said.endswith("loud")
    assert [line.split()[-1] for line in lines(tmp_path)] == ["quiet", "loud", "finished"]
    assert lines(tmp_path)[-1].endswith("run ended: finished")


def test_a_file_that_cannot_be_written_costs_the_log_only(
    role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    logs.begin_file(tmp_path)
    log.warning("one")
    log.warning("two")
    said = capsys.readouterr().err.splitlines()
    assert [("cannot be written" in line) for line in said] == [True, False, False]


def test_a_full_disc_costs_the_log_only(role: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "client-1.log").symlink_to("/dev/full")
    logs.begin_file(tmp_path)
    log.info("one")
    log.info("two")
    (said,) = capsys.readouterr().err.splitlines()
    assert "No space left" in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PeerLost("client 0 is gone"), "PeerLost: client 0 is gone"),
        (ConfigError("--x is 1"), "--x is 1"),
        (Paused("paused after step 12"), "paused after step 12"),
        (DataError("line 3: Mrs Smith"), "bad data; this role's terminal output says which"),
        (KeyError("Mrs Smith"), "KeyError (not foreseen: the traceback is in the terminal output)"),
    ],
)
def test_the_last_line_says_why_and_quotes_no_data(role: str, error: Exception, said: str, tmp_path: Path) -> None:
    logs.begin_file(tmp_path)
    logs.ended_badly(error)
    found = LINE.fullmatch(lines(tmp_path)[-1])
    assert found is not None
    assert found[1] == ("INFO" if isinstance(error, Paused) else "ERROR")
    assert found[2] == f"run ended: {said}"


def test_bad_input_is_one_plain_line_and_another_end_a_log_line(role: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.print_ending(role, ConfigError("--x is 1"))
    logs.print_ending(role, PeerLost("gone"))
    plain, logged = capsys.readouterr().err.splitlines()
    assert plain == "client-1: error: --x is 1"
    assert LINE.fullmatch(logged)
    assert logged.endswith("run ended: PeerLost: gone")


def test_a_script_ends_with_the_reason() -> None:
    """Bad input keeps its one line; a defect shows its traceback first."""
    code = "from hpc.cli import run_main\nfrom hpc.errors import *\ndef main(argv): raise {}\n"
    code += "run_main(main, ending='run ended')"

    def run(error: str) -> tuple[int, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", code.format(error)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stderr.splitlines()

    assert run("ConfigError('--x is 1')") == (2, ["error: --x is 1"])
    assert run("PeerLost('gone')") == (1, ["run ended: gone"])
    status, said = run("ValueError('odd')")
    assert status == 1
    assert "Traceback" in said[0]
    assert said[-1].startswith("run ended: ValueError: odd")


def test_the_last_line_of_who_was_killed_is_written_by_the_launcher(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = tmp_path / "words"
    words.mkdir()
    monkeypatch.setenv(LAST_WORDS, str(words))
    logs.begin_file(tmp_path)
    log.info("at work")
    logs.note_killed({"trunk-0": 1, "client-0": -9, role: -9}, words)
    assert lines(tmp_path)[-1].endswith("ERROR client-1 run ended: killed by SIGKILL")
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["client-1.log"], "client-0 had no log yet"
