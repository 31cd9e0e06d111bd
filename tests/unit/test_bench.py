"""Benchmarks: figures from made-up events and measurements, and that the committed tables say what was measured."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from hpc.bench import generation, results
from hpc.bench.load import Sample, family, shares
from hpc.bench.markdown import table
from hpc.bench.replica_pass import alternate
from hpc.bench.ring import Member, _flags
from hpc.bench.schedule_figures import figures
from hpc.bench.schedules import SYNC_EVERY, dealt, members
from hpc.bench.suite import Options, load_suite
from hpc.bench.turn_figures import member_figures, member_measured, quiet_rounds, ratios
from hpc.cli import make_parser, parse
from hpc.report.provenance import without_folders

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results"


# --- one member, from its events


def trunk_step(step: int, total: float, wait: float) -> dict[str, Any]:
    return {"event": "step", "step": step, "seconds": {"trunk": total - wait, "wait": wait, "total": total}}


def client_step(step: int, tail: float) -> dict[str, Any]:
    return {"event": "step", "step": step, "tokens": 10, "seconds": {"head": 0.1, "tail": tail, "total": 1.0}}


def turn_note(number: int, seconds: float, **more: float) -> dict[str, Any]:
    """Begun at 99 s."""
    return {"event": "turn", "number": number, "time": 99.0 + seconds, "seconds": seconds, **more}


def serial_events() -> dict[str, list[dict[str, Any]]]:
    """Two clients, four turns of two steps, and the step behind the last turn."""
    trunk = [trunk_step(step, total=step, wait=0.25 * step) for step in range(1, 10)]
    trunk += [turn_note(number, 20.0 + number, payload=100 * number) for number in range(1, 5)]
    trunk += [{"event": "average", "step": 4, "seconds": 0.5}]
    ended = {"event": "summary", "peak_rss_mib": 900.0}
    clients = {f"client-{c}": [client_step(s, s) for s in range(1 + c, 10, 2)] for c in range(2)}
    return {
        "trunk-0": [{"event": "started", "step": 0}, *trunk, ended],
        "client-0": [*clients["client-0"], {"event": "summary", "peak_rss_mib": 500.0}],
        "client-1": [*clients["client-1"], {"event": "summary", "peak_rss_mib": 600.0}],
    }


def measured_of(events: dict[str, list[dict[str, Any]]], steps_per_turn: int, turns: int) -> dict[str, Any]:
    asked: list[tuple[float, float]] = []

    def share(begin: float, end: float) -> dict[str, float]:
        asked.append((begin, end))
        return {"others": 0.01 * len(asked)}

    found = member_measured(events, steps_per_turn=steps_per_turn, turns=turns, share=share)
    assert asked == [(99.0, 99.0 + turn["seconds"]) for turn in found["turns"]]
    return found


def test_a_member_is_measured_turn_by_turn() -> None:
    events = serial_events()
    found = measured_of(events, steps_per_turn=2, turns=4)
    assert [turn["number"] for turn in found["turns"]] == [1, 2, 3, 4]
    third = found["turns"][2]  # steps 5 and 6
    by_role = third.pop("seconds_by_role")
    assert third == {"number": 3, "seconds": 23.0, "payload_bytes": 300, "others_share": 0.03}
    events["trunk-1"] = [turn_note(3, 23.0, payload=50)]
    assert measured_of(events, steps_per_turn=2, turns=4)["turns"][2]["payload_bytes"] == 350
    assert by_role["trunk-0"] == {"trunk": 8.25, "wait": 2.75, "total": 11.0}
    assert by_role["client-0"]["tail"] == 5.0
    assert by_role["client-1"]["tail"] == 6.0
    assert found["average_seconds"] == [0.5]


def test_figures_leave_the_warm_up_out() -> None:
    """Turns 3 and 4 count, steps 5 to 8: client 0 takes 5 and 7, client 1 takes 6 and 8."""
    found = member_figures(measured_of(serial_events(), steps_per_turn=2, turns=4), [3, 4])
    assert found["seconds"] == {"median": 23.5, "min": 23.0, "max": 24.0}
    assert found["trunk_idle_share"] == 0.25
    assert found["payload_bytes_per_turn"] == 350
    assert found["peak_rss_mib"] == {"trunk": 900.0, "client": 600.0, "uncut": None}
    profile = found["profile"]
    assert profile["trunk"] == {"trunk": 9.75, "wait": 3.25, "other": 0.0, "between": 10.5, "total": 23.5}
    assert profile["client"]["tail"] == 6.5
    assert profile["client"]["between"] == 22.5


def test_the_uncut_model_has_no_links() -> None:
    steps = [{"event": "step", "step": s, "tokens": 7, "seconds": {"total": 2.0}} for s in range(1, 5)]
    turns = [turn_note(number, 2.5) for number in range(1, 4)]
    found = measured_of({"centralised": [*steps, *turns]}, steps_per_turn=1, turns=3)
    shown = member_figures(found, [3])
    assert shown["trunk_idle_share"] is None
    assert shown["payload_bytes_per_turn"] is None
    assert shown["profile"]["centralised"] == {"other": 2.0, "between": 0.5, "total": 2.5}


def noisy(*shares: float) -> dict[str, Any]:
    return {"turns": [{"number": number, "others_share": share} for number, share in enumerate(shares, start=1)]}


def test_rounds_in_which_others_worked_do_not_count() -> None:
    members = {"a": noisy(0.9, 0.9, 0, 0.2, 0, 0, 0.05), "b": noisy(0, 0, 0, 0, 0.06, 0, 0)}
    assert quiet_rounds(members) == [3, 6, 7]


def test_with_few_quiet_rounds_all_count() -> None:
    assert quiet_rounds({"a": noisy(0, 0, 0, 0.2, 0.2, 0)}) == [3, 4, 5, 6]
    assert quiet_rounds({"a": noisy(0, 0, 0, 0)}) == [3, 4]


def test_others_are_who_is_not_of_the_family() -> None:
    processes = {1: (0, 100), 5: (1, 7), 6: (5, 8), 7: (6, 9), 8: (1, 50)}
    assert family(processes, 5) == {5: 7, 6: 8, 7: 9}


def test_shares_of_the_cores_between_two_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    samples = [Sample(10.0, 5.0, 0.0), Sample(12.0, 7.0, 0.0), Sample(14.0, 7.0, 1.0)]
    assert shares(samples, 10.0, 12.0) == {"others": 0.5, "stolen": 0.0}
    assert shares(samples, 11.0, 13.0) == {"others": 0.25, "stolen": 0.125}
    assert shares(samples, 0.0, 99.0) == {"others": 0.25, "stolen": 0.125}


# --- the suite, from made-up measurements


def made_up_member(seconds: list[float], *, uncut: bool = False) -> dict[str, Any]:
    roles = ["centralised"] if uncut else ["trunk-0", "client-0", "client-1"]
    turns = [
        {
            "number": number,
            "seconds": s,
            "payload_bytes": None if uncut else 1000,
            "others_share": 0.01,
            "seconds_by_role": {role: {"total": s / 2} | ({} if uncut else {"wait": s / 8}) for role in roles},
        }
        for number, s in enumerate(seconds, start=1)
    ]
    return {
        "steps_per_turn": 1,
        "turns": turns,
        "average_seconds": [],
        "peak_rss_mib": dict.fromkeys(roles, 100.0),
    }


def made_up(**factors: float) -> dict[str, Any]:
    """A machine that becomes slower from turn to turn; `factors`: schedule → times as long as the uncut model."""
    base = [9.0, 9.0, 1.0, 2.0, 4.0]
    factors = {"serial": 1.3, "client_batch": 1.1, "pipelined": 1.0, "replica": 1.32} | factors
    group = {name: made_up_member([factor * s for s in base]) for name, factor in factors.items()}
    setting = {"model": "m", "dtype": "float32", "cut": [1, 1], "adapter": "lora, r 8", "task": "t", "clients": 2}
    setting |= {"per_client_batch_size": 4, "sync_every": 5, "turns": 3, "warm_up_turns": 2}
    return {
        "setting": setting,
        "rings": [{"members": {"centralised": made_up_member(base, uncut=True), **group}}],
        "replica_memory": {"steps": 3, "trunk_peak_rss_mib": {"8 clients": 220.0, "1 client": 200.0}},
        "replica_pass": {
            "clients": 8,
            "rows": 1,
            "tokens": 40,
            "warm_up": 1,
            "seconds": {"together": [9.0, 1.0, 2.0, 3.0], "one_by_one": [9.0, 3.0, 5.0, 7.0]},
            "shares": {"others": 0.01, "stolen": 0.0},
        },
    }


def raw_of(measured: dict[str, Any]) -> dict[str, Any]:
    versions = dict.fromkeys(("python", "torch", "transformers", "peft", "deepspeed"), "1.0")
    return {
        "suite": "schedules",
        "date": "d",
        "command": "c",
        "git_commit": "g",
        "machine": {"cpu": "x", "cores": 2, "memory_gib": 1.0, "gpu": None},
        "threads": {"--run.threads": 0, "OMP_NUM_THREADS": None},
        "versions": versions,
        "figures": figures(measured),
        "measured": measured,
    }


def test_ratios_are_taken_turn_by_turn() -> None:
    """The machine drifts fourfold, the ratio does not."""
    group = made_up()["rings"][0]["members"]
    found = ratios(group["serial"], group["centralised"], [3, 4, 5])
    assert found == pytest.approx({"median": 1.3, "min": 1.3, "max": 1.3})


def test_goals_say_whether_they_are_met() -> None:
    met = [goal["met"] for goal in figures(made_up())["goals"]]
    #     serial, client_batch, pipelined, replica / client_batch (1.2), passes (2.5), memory (1.1)
    assert met == [False, True, True, True, True, True]
    found = [goal["found"] for goal in figures(made_up())["goals"]]
    assert found == pytest.approx([1.3, 1.1, 1.0, 1.2, 2.5, 1.1])
    assert [goal["met"] for goal in figures(made_up(replica=1.5))["goals"]][3] is False


def test_replica_needs_client_batch_beside_it() -> None:
    measured = made_up()
    del measured["rings"][0]["members"]["client_batch"]
    assert figures(measured)["replica_over_client_batch"] is None


def test_two_rings_have_a_reference_each() -> None:
    measured = made_up()
    (ring,) = measured["rings"]
    slow = {
        name: made_up_member([10.0, 10.0, 10.0, 10.0, 10.0], uncut=name == "centralised")
        for name in ("centralised", "replica")
    }
    measured["rings"].append({**ring, "members": slow})
    rows = figures(measured)["schedules"]
    assert [(row["ring"], row["schedule"]) for row in rows][-2:] == [(1, "centralised"), (1, "replica")]
    assert rows[-1]["ratio"]["median"] == 1.0


def test_the_table_is_made_from_the_measurements() -> None:
    text = load_suite("schedules").table(raw_of(made_up()))
    row = next(line for line in text.splitlines() if line.startswith("| `serial`"))
    assert "2.60 s" in row
    assert "1.300" in row
    assert "25 %" in row
    assert text.count("| not met |") == 1
    assert "3 of 3 rounds count" in text


def test_a_table_says_when_the_machine_was_busy() -> None:
    measured = made_up()
    for turn in measured["rings"][0]["members"]["serial"]["turns"]:
        turn["others_share"] = 0.5
    assert "The machine was not quiet" in load_suite("schedules").table(raw_of(measured))


def test_a_table_lines_up() -> None:
    lines = table(("a", "b"), [["wide cell", "1"], ["x", "22"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | -: |"


# --- files


def test_what_is_saved_is_rendered(tmp_path: Path) -> None:
    raw = raw_of(made_up())
    measured = raw.pop("measured")
    raw.pop("suite")
    raw.pop("figures")
    path = results.save(tmp_path, "schedules", measured, raw)
    assert json.loads(path.read_text())["figures"] == figures(measured)
    assert results.render(tmp_path) == [
        tmp_path / "tables" / "bench-schedules.md",
        tmp_path / "figures" / "bench-schedules.png",
    ]
    assert all(not name.name.startswith(".") for name in tmp_path.rglob("*"))


def test_there_is_something_to_render() -> None:
    assert {"schedules", "generation", "scale"} <= set(results.names(RESULTS))


@pytest.mark.parametrize("name", results.names(RESULTS))
def test_the_committed_table_says_what_was_measured(name: str) -> None:
    path = results.raw_path(RESULTS, name)
    raw = results.load(path)
    suite = load_suite(raw["suite"])
    assert suite.table(raw) == results.table_path(RESULTS, name).read_text(encoding="utf-8")
    if suite.csv is not None:
        assert suite.csv(raw) == results.csv_path(RESULTS, name).read_text(encoding="utf-8")
    assert suite.figures(raw["measured"]) == raw["figures"]
    assert results.figure_path(RESULTS, name).exists()
    told = path.read_text() + results.table_path(RESULTS, name).read_text()
    assert not re.search(r"[\"' =](/home|/root|/work|/tmp|/Users)/", told), "a folder of somebody's machine"


def test_a_command_line_is_told_without_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_folders(str(tmp_path / "a" / "b.yaml")) == "a/b.yaml"
    assert without_folders("--config=/elsewhere/c.yaml") == "--config=c.yaml"
    assert without_folders("--train.clients") == "--train.clients"
    assert without_folders("rel/ative") == "rel/ative"


# --- what the runs are told


def options(*flags: str) -> Options:
    config = parse(make_parser("x"), list(flags))[0]
    return Options(config=config, flags=tuple(flags), local=Path("local.py"), folder=Path("unused"), turns=3)


@pytest.mark.parametrize("member", members(4), ids=lambda member: member.name)
def test_every_member_sees_the_same_tokens_in_a_turn(member: Member) -> None:
    flags = ("--config", str(ROOT / "launch" / "recipes" / "demo.yaml"), "--train.clients", "4")
    config = parse(make_parser("x"), _flags(member, options(*flags), 8))[0]
    assert member.name.startswith(config.train.schedule)
    assert config.train.max_steps == 8 * member.steps_per_turn + 1
    assert member.steps_per_turn == (4 if member.name in ("serial", "centralised_sequential") else 1)
    assert config.train.sync_every == (SYNC_EVERY if member.name == "replica" else 1)
    assert not config.data.evaluates
    assert config.run.baseline_steps == 0


def test_every_ring_has_the_reference() -> None:
    rings = [[member.name for member in ring] for ring in dealt(members(4), 2)]
    assert rings == [
        ["centralised", "centralised_sequential", "serial", "pipelined"],
        ["centralised", "pipelined_2_ranks", "client_batch", "replica"],
    ]
    assert dealt(members(4), 1) == [members(4)]


def test_two_works_take_turns() -> None:
    order: list[str] = []
    seconds = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert order == ["a", "b"] * 3
    assert [len(each) for each in seconds.values()] == [3, 3]


def test_a_tokens_ratio_is_taken_turn_by_turn() -> None:
    rounds = [
        {"split": split, "uncut": uncut, "same_tokens": 1.0} for split, uncut in ((0.2, 0.1), (0.3, 0.3), (0.9, 0.6))
    ]
    (row,) = generation.figures({"rounds": {"greedy": rounds}})["ways"]
    assert row["ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert row["same_tokens"]
    assert not row["met"]
    (other,) = generation.figures({"rounds": {"greedy": [{**rounds[1], "same_tokens": 0.0}]}})["ways"]
    assert other["met"]
    assert not other["same_tokens"]
