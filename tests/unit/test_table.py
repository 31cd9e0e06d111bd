"""The closing tables and the progress lines, as text."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from hpc.report import events as e
from hpc.report.cells import size
from hpc.report.progress import Progress
from hpc.report.summary import summarise
from hpc.report.table import print_summary
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
        "Trunk idle 16.0 % of its time",
        "1.3333",
        "0.3333",
        "1.5000",
    ):
        assert expected in text
    assert "\x1b" not in text


def rows(text: str) -> dict[str, list[str]]:
    """First cell of each line → its other cells (cells are at least two blanks apart)."""
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]
    return {found[0]: found[1:] for found in cells if found}


def test_held_out_loss_stands_beside_accuracy(tmp_path: Path) -> None:
    case.write_run(tmp_path)
    found = rows(printed(tmp_path))
    assert found["client-1"] == ["37.5 %", "62.5 %", "+25.0", "1.0000", "0.2500", "-0.7500"]
    assert found["mean client"] == ["43.8 %", "81.2 %", "+37.5", "1.5000", "0.3750", "-1.1250"]
    assert found["all (12 examples)"] == ["41.7 %", "75.0 %", "+33.3", "1.3333", "0.3333", "-1.0000"]
    assert found["training loss"] == ["1.0000", "0.2500", "-0.7500"]


def many_clients(count: int) -> dict[str, list[e.Event]]:
    """Client k has k of `count` held-out examples right; all hold the same parts."""
    parts = {"head": {"owned": 2_000_000, "trainable": 2}, "tail": {"owned": 3_000_000, "trainable": 3}}
    ended = {"event": "summary", "parameters": parts, "keys_read": 3}
    evaluation = {"event": "eval", "step": 0, "total": count, "loss_sum": 1.0, "label_tokens": count}
    return {f"client-{k}": [{**evaluation, "correct": k}, {**ended, "peak_rss_mib": 100.0 + k}] for k in range(count)}


def text_of(events: dict[str, list[e.Event]], clients: int) -> str:
    text = io.StringIO()
    print_summary(summarise(case.config(clients=clients), events), console=Console(file=text, width=80))
    return text.getvalue()


def test_of_many_clients_the_best_the_median_and_the_worst_are_named() -> None:
    found = rows(text_of(many_clients(64), 64))
    assert found["best: client-63"][0] == "98.4 %"
    assert found["median: client-32"][0] == "50.0 %"
    assert found["worst: client-0"][0] == "0.0 %"
    assert found["client-0 and 63 alike"] == ["head", "2,000,000", "2", "up to 163 MiB"]
    assert "client-5" not in found
    few = rows(text_of(many_clients(8), 8))
    assert few["client-5"][0] == "62.5 %"
    assert "best: client-7" not in few


def test_many_clients_without_held_out_examples_print() -> None:
    events = many_clients(12)
    for found in events.values():
        found[0].update(total=0, correct=0, label_tokens=0)
    assert "best" not in text_of(events, 12)


def test_a_client_that_holds_something_else_is_not_alike() -> None:
    events = many_clients(12)
    events["client-3"][1]["parameters"] = {"head": {"owned": 7, "trainable": 7}}
    found = rows(text_of(events, 12))
    assert found["client-0 and 10 alike"][0] == found["client-3"][0] == "head"


def test_bytes_that_a_cache_spared_are_in_the_traffic_table(tmp_path: Path) -> None:
    case.write_run(tmp_path)
    assert "by cache" not in printed(tmp_path)
    path = e.role_path(tmp_path, "trunk-0")
    with e.EventLog(path) as log:
        for event in e.read_events(path):
            if event["event"] == "step":
                log.note("step", **{k: v for k, v in event.items() if k not in ("event", "time", "role", "bytes")},
                         bytes={**event["bytes"], "cached": 3072})  # fmt: skip
    for width in (80, 120):
        text = printed(tmp_path, width)
        assert max(len(line) for line in text.splitlines()) <= width
        assert "spared by cache" in text
        assert "3.00 KiB" in text
        assert "first step 1000 B, of the last 3.91 KiB" in text.replace("\n", " ")


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


def trunk_step(step: int) -> e.TrunkStep:
    sent = {"payload": 1000, "wire": 1024}
    return e.TrunkStep(step=step, seconds={"total": 1.0}, bytes=sent, learning_rate=0.1, grad_norm=1.0)


def client_step(step: int, loss: float) -> e.ClientStep:
    return e.ClientStep(step=step, loss_sum=loss, label_tokens=1, tokens=1, seconds={"total": 1.0})


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_run_that_stops_early_ends_where_it_stopped(tmp_path: Path, terminal: bool) -> None:
    case.write_run(tmp_path)
    stream = io.StringIO()
    with Progress(tmp_path, total_steps=100, clients_per_step=2, stream=stream, terminal=terminal) as progress:
        progress.poll()
        with e.EventLog(e.role_path(tmp_path, "trunk-0")) as log:
            log.write(trunk_step(5))
            log.note("early_stop", step=5)
    text = stream.getvalue().replace("\r", "\n").splitlines()
    assert "5/100" in text[-1]
    assert "stopped early" in text[-1]
    assert not any("stopped early" in line for line in text if "4/100" in line)


def test_progress_of_cohorts_and_without_a_lost_client(tmp_path: Path) -> None:
    """Two of three clients in each step; then one is lost, and some steps have one client."""
    logs = {name: e.EventLog(e.role_path(tmp_path, name)) for name in ("trunk-0", "client-0", "client-1", "client-2")}
    stream = io.StringIO()
    progress = Progress(tmp_path, total_steps=4, clients_per_step=2, stream=stream, terminal=True)

    def take(step: int, **losses: float) -> str:
        for client, loss in losses.items():
            logs[client.replace("_", "-")].write(client_step(step, loss))
        logs["trunk-0"].write(trunk_step(step))
        progress.poll()
        return stream.getvalue().rsplit("\r")[-1]

    assert "loss 2.0000" in take(1, client_0=1.0, client_2=3.0)
    assert "loss 4.0000" in take(2, client_1=2.0, client_2=6.0)
    assert "loss 4.0000" in take(3, client_0=9.0)  # not yet told, as far as is known: the newest whole loss stands
    logs["trunk-0"].note("client_lost", step=4, client_id=1, why="silent")
    assert "loss 7.0000" in take(4, client_0=7.0)
    logs["trunk-0"].note("early_stop", step=4)
    progress.poll()
    logs["trunk-0"].write(e.Started(step=1))  # resumed with other settings: nobody is lost, and it goes on
    after = take(2, client_1=5.0)
    assert "loss 5.0000" not in after
    assert "stopped early" not in after
    progress.close()


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Progress(tmp_path, total_steps=4, clients_per_step=2, stream=stream, terminal=True) as progress:
        case.write_run(tmp_path)
        progress.poll()
    assert "4/4" in stream.getvalue()
    assert "loss 0.2500" in stream.getvalue()
