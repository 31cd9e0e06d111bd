"""Suite `scale`: figures from made-up runs, and what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpc.bench.ring import Member, _flags
from hpc.bench.scale import FLAGS, SUITE
from hpc.bench.scale_figures import REFERENCE, figures, sizes
from hpc.bench.suite import Options
from hpc.cli import make_parser, parse

BUSY = 0.5


def made_up_run(clients: int, seconds: list[float], *, others: float = 0.0) -> dict[str, Any]:
    """Two slow steps to warm up, then `seconds`; the trunk waits for a quarter of each."""
    turns = [
        {
            "number": number,
            "seconds": spent,
            "payload_bytes": 1,
            "others_share": others,
            "seconds_by_role": {"trunk-0": {"wait": spent / 4, "total": spent}},
        }
        for number, spent in enumerate([99.0, 99.0, *seconds], start=1)
    ]
    peaks = {"trunk-0": 300.0 + 10 * clients, **{f"client-{each}": 200.0 + each for each in range(clients)}}
    return {
        "clients": clients,
        "start_up_seconds": 5.0 + 2 * clients,
        "member": {"steps_per_turn": 1, "turns": turns, "average_seconds": [], "peak_rss_mib": peaks},
    }


def made_up(last: float = 0.85) -> dict[str, Any]:
    """A step takes 0.05 s and 0.1 s a client; at 8 clients it takes `last`."""
    runs = [made_up_run(count, [0.05 + 0.1 * count] * 2 + [0.06 + 0.1 * count]) for count in (1, 2, 4)]
    setting = {"model": "m", "dtype": "float32", "cut": [1, 1], "encryption": "aes-256-gcm"}
    setting |= {"per_client_batch_size": 4, "turns": 3, "warm_up_turns": 2}
    return {"setting": setting, "runs": [*runs, made_up_run(8, [last] * 3)]}


def raw_of(measured: dict[str, Any]) -> dict[str, Any]:
    about = {"cores": 2, "cpu": "a processor", "memory_gib": 8, "gpu": None}
    names = ("python", "torch", "transformers", "peft", "deepspeed")
    origin = {"command": "python launch/bench.py scale", "date": "then", "git_commit": "abc", "threads": {}}
    return {"machine": about, "versions": dict.fromkeys(names, "1"), **origin, "measured": measured}


def test_the_number_of_clients_doubles_up_to_the_largest() -> None:
    assert sizes(32) == [1, 2, 4, 8, 16, 32]
    assert sizes(6) == [1, 2, 4, 6]
    assert sizes(1) == [1]


def test_a_row_leaves_the_warm_up_out() -> None:
    row = figures(made_up())["rows"][2]
    assert row["clients"] == 4
    assert row["step_seconds"] == pytest.approx({"median": 0.45, "min": 0.45, "max": 0.46})
    assert row["seconds_per_client"]["median"] == pytest.approx(0.1125)
    assert row["trunk_idle_share"] == pytest.approx(0.25)
    assert (row["trunk_peak_rss_mib"], row["client_peak_rss_mib"], row["start_up_seconds"]) == (340.0, 203.0, 13.0)


def test_lines_give_back_what_the_runs_were_made_of() -> None:
    lines = figures(made_up())["lines"]
    assert lines["step_seconds"] == pytest.approx({"per_client": 0.1, "intercept": 0.05})
    assert lines["trunk_peak_rss_mib"] == pytest.approx({"per_client": 10.0, "intercept": 300.0})
    assert lines["start_up_seconds"] == pytest.approx({"per_client": 2.0, "intercept": 5.0})


@pytest.mark.parametrize(("last", "met"), [(0.85, True), (8 * 0.1149, True), (8 * 0.1151, False)])
def test_growth_is_at_most_linear(last: float, met: bool) -> None:
    """The slowest of the steps at 4 clients took 0.46 s: 0.115 s a client."""
    goal = figures(made_up(last))["goal"]
    assert (goal["reference_clients"], goal["largest_clients"]) == (REFERENCE, 8)
    assert goal["limit_seconds_per_client"] == pytest.approx(0.115)
    assert goal["met"] is met


def test_a_single_number_has_no_line_and_no_goal() -> None:
    measured = made_up()
    measured["runs"] = measured["runs"][:1]
    found = figures(measured)
    assert found["goal"] is None
    assert set(found["lines"].values()) == {None}
    assert "Goal" not in SUITE.table(raw_of(measured))


def test_the_table_tells_rows_lines_and_goal() -> None:
    text = SUITE.table(raw_of(made_up(2.0)))
    row = next(line for line in text.splitlines() if line.startswith("|       4 |"))
    for words in ("0.450 s", "0.450 – 0.460", "112.5 ms", "25%", "340 MiB", "203 MiB", "13.0 s"):
        assert words in row
    assert "10.0 MiB" in text
    assert "115.0 ms a client: not met" in text


def test_a_table_tells_how_busy_the_machine_was() -> None:
    measured = made_up()
    measured["runs"][0] = made_up_run(1, [0.15] * 3, others=BUSY)
    assert "at most 50.0% of the cores" in SUITE.table(raw_of(measured))


def test_it_is_drawn(tmp_path: Path) -> None:
    for runs in (4, 1):
        measured = made_up()
        measured["runs"] = measured["runs"][:runs]
        assert SUITE.draw(raw_of(measured), tmp_path / f"{runs}.png").stat().st_size > 10_000


def test_a_run_is_told_its_number_of_clients() -> None:
    flags = ("--model.name_or_path", "tiny-llama", "--train.clients", "32", "--train.schedule", "serial")
    config = parse(make_parser("x"), list(flags))[0]
    options = Options(config=config, flags=flags, local=Path("local.py"), folder=Path("unused"), turns=3)
    told = parse(make_parser("x"), _flags(Member(name="4", flags=(*FLAGS, "--train.clients", "4")), options, 5))[0]
    assert (told.train.clients, told.train.schedule, told.train.max_steps) == (4, "client_batch", 6)
    assert told.link.transport == "gloo"
    assert told.link.encryption == "aes-256-gcm"
