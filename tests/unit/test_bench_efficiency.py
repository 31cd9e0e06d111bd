"""Suite `efficiency`: the same samples for everybody, figures from made-up measurements, and what is told of them."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hpc.bench import namespaces
from hpc.bench.efficiency import MOST_CLIENTS, SAMPLES, SUITE, clients_of, in_rings, members
from hpc.bench.efficiency_figures import TITLES, figures
from hpc.bench.fixed_rows import lengths, write_rows
from hpc.bench.namespaces import Hosts
from hpc.bench.published import CENTRALISED, PUBLISHED
from hpc.bench.ring import Member, _flags
from hpc.bench.suite import Options
from hpc.cli import make_parser, parse
from hpc.config import Config
from hpc.data.dataset import load_client_data
from hpc.data.examples import training_examples
from hpc.errors import ConfigError, DataError
from hpc.model.pretrained import load_tokenizer
from hpc.reproduce.efficiency import list_efficiency, options_of
from hpc.reproduce.preset import load_preset
from hpc.source.resolve import resolve

ROOT = Path(__file__).resolve().parents[2]
PRESETS = ROOT / "launch" / "presets"
HOSTS = Hosts(tag="c0ffee", cables=1)
TINY = ("--model.name_or_path", "tiny-llama")


def config_of(*flags: str) -> Config:
    return parse(make_parser("x"), [*TINY, *flags])[0]


# --- what was published


def test_published_ratios_are_those_that_the_papers_print() -> None:
    found = {name: round(each.ratio, 2) for name, each in PUBLISHED.items() if each.paper == "FL-GLM"}
    assert found == {"one_host": 1.97, "two_hosts": 5.31}
    assert round(PUBLISHED["serial_2"].ratio, 2) == 1.80
    assert round(PUBLISHED["client_batch_8"].ratio, 2) == 1.28
    assert PUBLISHED["replica_8"].seconds == pytest.approx(0.0864)
    assert pytest.approx({"FL-GLM": 0.91, "FedSEA": 0.3819}) == CENTRALISED


def test_every_published_row_is_measured() -> None:
    assert {member.name for member in members(8, HOSTS)} == {"centralised", *PUBLISHED} == set(TITLES)


# --- who is measured, on what


@pytest.mark.parametrize("member", members(8, HOSTS), ids=lambda member: member.name)
def test_a_turn_is_the_same_number_of_samples_for_everybody(member: Member) -> None:
    options = Options(config=Config(), flags=TINY, local=Path("x"), folder=Path("x"), turns=3)
    config = parse(make_parser("x"), _flags(member, options, 5))[0]
    train = config.train
    at_once = 1 if train.schedule in ("serial", "centralised") else train.clients
    assert train.per_client_batch_size == 1
    assert member.steps_per_turn * at_once == SAMPLES
    assert train.max_steps == 5 * member.steps_per_turn + 1
    if train.schedule == "replica":
        assert train.sync_every == member.steps_per_turn, "one average a turn"
    if train.schedule == "serial":
        assert train.sync_every * train.clients == SAMPLES, "every client has its part of the turn"
    assert (member.hosts is HOSTS) == (member.name == "two_hosts")


def test_few_clients_live_at_the_same_time() -> None:
    everybody = members(8, HOSTS)
    for most in (MOST_CLIENTS, MOST_CLIENTS // 2):
        rings = in_rings(everybody, most)
        assert all(ring[0].name == "centralised" for ring in rings)
        assert all(sum(clients_of(member) for member in ring[1:]) <= most for ring in rings)
        assert [member for ring in rings for member in ring[1:]] == everybody[1:]
    assert len(in_rings(everybody, MOST_CLIENTS)) == 2
    assert [len(ring) for ring in in_rings(everybody, 1)] == [2] * 9


def test_without_hosts_and_with_fewer_clients_there_are_fewer_rows() -> None:
    assert [member.name for member in members(1, None)] == ["centralised", "one_host"]
    names = [member.name for member in members(2, None)]
    assert names == ["centralised", "one_host", "serial_2", "client_batch_2", "replica_2"]


def test_the_same_rows_whatever_the_number_of_clients(tmp_path: Path) -> None:
    """They are the tokens of the task's own rows, and the clients' shares of them are equal and together all."""
    config = config_of("--data.train_examples", "20")
    tokenizer = load_tokenizer(resolve(config.model))
    alone = config_of("--data.train_examples", "20", "--train.clients", "1")
    own = [tuple(row.ids) for row in load_client_data(alone, 0, tokenizer).train_rows[:SAMPLES]]
    flags = write_rows(config, SAMPLES, tmp_path / "new" / "rows.jsonl")
    for clients in (1, 2, 4, 8):
        shared = config_of(*flags, "--train.clients", str(clients), "--data.val_examples", "0")
        shares = [load_client_data(shared, client, tokenizer).train_rows for client in range(clients)]
        assert {len(share) for share in shares} == {SAMPLES // clients}
        rows = [row for share in shares for row in share]
        # A generated answer ends with the end of text, which a choice does not.
        ids = [tuple(row.ids if tuple(row.ids) in own else row.ids[:-1]) for row in rows]
        assert Counter(ids) == Counter(own)
    assert sorted(lengths((*TINY, *flags))) == sorted(len(row.ids) for row in rows)


def test_a_row_that_is_too_long_keeps_its_question(tmp_path: Path) -> None:
    config = config_of("--data.train_examples", "8")
    flags = (*write_rows(config, SAMPLES, tmp_path / "rows.jsonl"), "--data.max_source_length", "90")
    alone = config_of(*flags, "--train.clients", "1", "--data.val_examples", "0")
    tokenizer = load_tokenizer(resolve(alone.model))
    rows = load_client_data(alone, 0, tokenizer).train_rows
    for row, example in zip(rows, training_examples(alone, 0), strict=True):
        assert row.prompt_len <= 90
        assert tokenizer.decode(row.ids[: row.prompt_len]).endswith(example.after)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ward_notes has 3 training examples; 8 are needed"):
        write_rows(config_of("--data.train_examples", "3"), SAMPLES, tmp_path / "rows.jsonl")


# --- figures and table, from made-up measurements

BASE = [99.0, 99.0, 8.0, 16.0, 32.0]  # seconds of a turn; the machine becomes slower and slower


def made_up_member(factor: float, clients: int, steps: int, *, uncut: bool = False) -> dict[str, Any]:
    roles = ["centralised"] if uncut else ["trunk-0", *(f"client-{client}" for client in range(clients))]
    turns = [
        {
            "number": number,
            "seconds": factor * seconds,
            "payload_bytes": None if uncut else 2**20 * steps,
            "others_share": 0.01,
            "seconds_by_role": {
                role: {"total": factor * seconds / 2} | ({} if uncut else {"wait": factor * seconds / 8})
                for role in roles
            },
        }
        for number, seconds in enumerate(BASE, start=1)
    ]
    peaks = dict.fromkeys(roles, 100.0)
    return {
        "clients": clients,
        "steps_per_turn": steps,
        "turns": turns,
        "average_seconds": [],
        "peak_rss_mib": peaks,
    }


def made_up(cable: dict[str, Any] | None = None) -> dict[str, Any]:
    """The second ring meets a machine three times as slow."""
    first = {
        "centralised": made_up_member(1, 1, 8, uncut=True),
        "replica_2": made_up_member(0.5, 2, 4),
        "two_hosts": made_up_member(1.5, 1, 8),
    }
    if cable is not None:
        del first["two_hosts"]
    second = {"centralised": made_up_member(3, 1, 8, uncut=True), "client_batch_8": made_up_member(2.4, 8, 1)}
    names = ("model", "dtype", "adapter", "encryption", "task")
    setting = {**dict.fromkeys(names, "x"), "cut": [1, 1], "tokens": [70, 80], "samples_per_turn": 8}
    setting |= {"turns": 3, "warm_up_turns": 2}
    found = {"asked_bytes_per_second": 1.1e9, "found_bytes_per_second": 1.05e9, "carried_bytes": 1}
    return {"setting": setting, "cable": cable or found, "rings": [{"members": first}, {"members": second}]}


def raw_of(measured: dict[str, Any]) -> dict[str, Any]:
    about = {"cores": 2, "cpu": "a processor", "memory_gib": 8, "gpu": None}
    versions = dict.fromkeys(("python", "torch", "transformers", "peft", "deepspeed"), "1")
    origin = {"command": "c", "date": "then", "git_commit": "abc", "threads": {}}
    return {"machine": about, "versions": versions, **origin, "measured": measured}


def test_a_ratio_is_to_the_uncut_model_of_the_same_ring_turn_by_turn() -> None:
    found = figures(made_up())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["centralised", "two_hosts", "client_batch_8", "replica_2"], "in the table's order"
    assert rows["centralised"]["ratio"] is None
    assert rows["two_hosts"]["ratio"] == pytest.approx({"median": 1.5, "min": 1.5, "max": 1.5})
    assert rows["client_batch_8"]["ratio"]["median"] == pytest.approx(0.8)
    assert rows["replica_2"]["ratio"]["median"] == pytest.approx(0.5)
    assert [each["median"] for each in found["references"]] == pytest.approx([2.0, 6.0])


def test_samples_and_steps_are_told_apart() -> None:
    """Eight samples take 16 · 2.4 s in the middle turn: one step of eight clients."""
    (row,) = (row for row in figures(made_up())["rows"] if row["name"] == "client_batch_8")
    assert row["samples_per_step"] == 8
    assert row["sample_seconds"] == pytest.approx({"median": 4.8, "min": 2.4, "max": 9.6})
    assert row["step_seconds"]["median"] == pytest.approx(38.4)
    assert row["payload_bytes_per_step"] == 2**20
    (two,) = (row for row in figures(made_up())["rows"] if row["name"] == "replica_2")
    assert two["samples_per_step"] == 2
    assert two["step_profile"]["trunk"]["wait"] == pytest.approx(0.5 * 56 / 3 / 8 / 4)
    assert two["published"] == pytest.approx({"paper": "FedSEA", "sample_seconds": 0.3482, "ratio": 348.2 / 381.9})


def test_the_table_has_ours_and_theirs() -> None:
    lines = SUITE.table(raw_of(made_up())).splitlines()
    row = next(line for line in lines if line.startswith("| split, two hosts"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:8] == ["3.000 s", "1.500 – 6.000 s", "1.50", "1.50 – 1.50", "5.31 (FL-GLM)", "4.830 s"]
    (uncut,) = (line for line in lines if line.startswith("| centralised") and "FedSEA" in line)
    assert "0.910 s (FL-GLM), 0.382 s (FedSEA)" in uncut
    assert any("to 1,100 MB/s" in line and "got 1,050 MB/s" in line for line in lines)
    assert any("Not measured" in line and "client-batch, 2 clients" in line for line in lines)


def test_what_this_machine_cannot_do_is_said_and_not_guessed(tmp_path: Path) -> None:
    raw = raw_of(made_up({"asked_bytes_per_second": 1.1e9, "left_out": "network namespaces need root"}))
    text = SUITE.table(raw)
    row = next(line for line in text.splitlines() if line.startswith("| split, two hosts"))
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:8] == ["left out", "-", "-", "-", "5.31 (FL-GLM)", "4.830 s"]
    assert "are left out**: network namespaces need root." in text
    assert "two_hosts" not in {row["name"] for row in figures(raw["measured"])["rows"]}
    assert SUITE.draw(raw, tmp_path / "x.png").stat().st_size > 10_000


def test_other_programs_can_read_the_numbers() -> None:
    assert SUITE.csv is not None
    rows = {row["row"]: row for row in csv.DictReader(SUITE.csv(raw_of(made_up())).splitlines())}
    assert float(rows["two_hosts"]["ratio"]) == pytest.approx(1.5)
    assert float(rows["two_hosts"]["published_ratio"]) == pytest.approx(4.83 / 0.91)
    assert rows["centralised"]["ratio"] == rows["centralised"]["published_ratio"] == ""
    assert int(rows["replica_2"]["clients"]) == 2


def test_only_root_makes_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(namespaces, "why_not", namespaces.why_not.__wrapped__)
    assert namespaces.why_no_slow_cable(8800, "4mb") == "network namespaces need root"


# --- as a preset says


@pytest.mark.parametrize("name", [path.stem for path in PRESETS.glob("*.yaml") if path.stem != "smoke"])
def test_presets_measure_as_the_paper_does(name: str) -> None:
    preset = load_preset(name, PRESETS)
    if preset.efficiency is None:
        pytest.skip(f"{name} measures no time")
    options = options_of(preset, root=ROOT, results=Path("r"), data_dir=Path("d"))
    adapter = options.config.adapter
    assert (adapter.method, adapter.lora_r, adapter.lora_alpha) == ("lora", 8, 16)
    assert (options.config.model.head_blocks, options.config.model.tail_blocks) == (1, 1)
    assert options.config.train.clients == 8


def test_a_dry_run_lists_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    list_efficiency(load_preset("small", PRESETS))
    told = capsys.readouterr().out
    assert all(f"  {name}: " in told for name in TITLES)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("", "its section `efficiency` would say how"),
        ("efficiency: {turns: 0, flags: {}}", "efficiency.turns is 0; it must be a whole number of at least 1"),
        ("efficiency: {turns: 1, flags: {}, round: 2}", "round"),
        ("efficiency: {turns: 1}", "flags"),
    ],
)
def test_a_preset_that_cannot_be_measured_is_refused(section: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(f"scale: s\nseeds: [0]\nmodels: {{}}\nadapters: {{}}\ntasks: {{}}\ntables: {{}}\n{section}\n")
    with pytest.raises(ConfigError, match=said):
        options_of(load_preset(str(path), PRESETS), root=ROOT, results=tmp_path, data_dir=tmp_path)


def test_other_tasks_are_read_where_the_data_is(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    section = json.dumps({"turns": 1, "flags": {"model.name_or_path": "tiny-llama", "data.task": "record"}})
    path.write_text(
        f"scale: s\nseeds: [0]\nmodels: {{}}\nadapters: {{}}\ntasks: {{}}\ntables: {{}}\nefficiency: {section}\n"
    )
    options = options_of(load_preset(str(path), PRESETS), root=ROOT, results=tmp_path, data_dir=tmp_path)
    assert options.config.data.data_dir == str(tmp_path)
