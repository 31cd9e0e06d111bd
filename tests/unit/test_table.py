"""The closing tables and the progress lines, as text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from hpc.report.progress import Progress
from hpc.report.summary import summarise
from hpc.report.table import print_summary, size
from tests.unit import report_case as case


def printed(folder: Path, width: int = 80, *, drop: str = "", encryption: str = "aes-256-gcm") -> str:
    events = {role: found for role, found in case.read_run(folder).items() if role != drop}
    summary = {**summarise(case.config(), events), "encryption": encryption}
    text = io.StringIO()
    print_summary(summary, folder=folder, console=Console(file=text, width=width, highlight=False))
    return text.getvalue()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_tables_fit_and_hold_the_figures(tmp_path: Path, width: int) -> None:
    case.write_run(tmp_path)
    text = printed(tmp_path, width)
    assert max(len(line) for line in text.splitlines()) <= min(width, 120)
    for expected in (
        "41.7 %",
        "75.0 %",
        "1.0000",
        "0.2500",
        "2.44 KiB",
        "2.69 KiB",
        "10.000 %",
        "aes-256-gcm",
        "2.00x",
    ):
        assert expected in text
    assert "\x1b" not in text


def test_an_unencrypted_run_says_so(tmp_path: Path) -> None:
    case.write_run(tmp_path)
    assert "PLAINTEXT" in printed(tmp_path, encryption="off")


def test_unknown_losses_are_explained(tmp_path: Path) -> None:
    case.write_run(tmp_path, baseline=False)
    text = printed(tmp_path, drop="client-0")
    assert "not in this folder" in text
    assert "uncut" not in text


def test_a_run_that_told_nothing_prints(tmp_path: Path) -> None:
    assert "0 steps" in printed(tmp_path)


def test_an_ascii_stdout_is_enough(tmp_path: Path) -> None:
    case.write_run(tmp_path)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_summary(summarise(case.config(), case.read_run(tmp_path)), console=Console(file=stream, width=80))
    stream.flush()


@pytest.mark.parametrize(("number", "text"), [(None, "-"), (0, "0 B"), (1023, "1023 B"), (2359296, "2.25 MiB")])
def test_size(number: float | None, text: str) -> None:
    assert size(number) == text


def test_progress_off_a_terminal_is_a_few_lines(tmp_path: Path) -> None:
    case.write_run(tmp_path)
    stream = io.StringIO()
    with Progress(tmp_path, total_steps=4, clients_per_step=2, stream=stream) as progress:
        progress.poll()
        progress.poll()
    assert stream.getvalue() == "step 4/4: loss 0.2500, 3.000 s/step, 4.30 KiB/step\n"


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress(tmp_path, total_steps=4, clients_per_step=2, stream=stream, terminal=True) as progress:
        case.write_run(tmp_path)
        progress.poll()
    assert "4/4" in stream.getvalue()
    assert "loss 0.2500" in stream.getvalue()
