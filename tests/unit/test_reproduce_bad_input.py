"""What is wrong about a table is said in one line that names it, before the first run, and nothing is written."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpc.errors import BadInput, ConfigError, DataError
from hpc.reproduce import raw
from hpc.reproduce.plan import cells_of, jobs_of
from hpc.reproduce.preset import load_preset
from hpc.reproduce.run import Bench
from tests.unit.preset_case import ROOT, SHIPPED, content, preset_of, write_preset
from tests.unit.task_records import RECORDS, write_lines

BLOCK = {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": ["centralised", "serial"]}
TUNING = {"model": "tiny", "tasks": ["rte"], "rates": {"lora": [0.1]}}


def table(**changes: Any) -> dict[str, Any]:
    return {"tables": {"table1": [{**BLOCK, **changes}]}}


BAD_PRESETS: dict[str, tuple[dict[str, Any], str]] = {
    "lacks a section": ({"tables": None}, "it lacks the key 'tables'"),
    "misspelt section": ({"comon": {}}, "it has an unknown key 'comon'; did you mean common?"),
    "seeds": ({"seeds": 0}, "seeds must be a list of whole numbers from 0 on, not 0"),
    "negative seed": ({"seeds": [-1]}, r"seeds must be a list of whole numbers from 0 on, not \[-1\]"),
    "models": ({"models": ["tiny"]}, r"models must be a mapping, not \['tiny'\]"),
    "flags of a model": ({"models": {"tiny": "tiny-llama"}}, "models.tiny must be a mapping, not 'tiny-llama'"),
    "name of a model": ({"models": {"a/b": {}}}, "models: 'a/b' is no name"),
    "lacks batches": ({"tasks": {"rte": {"flags": {}}}}, "tasks.rte lacks the key 'batches'"),
    "no batches": ({"tasks": {"rte": {"batches": 0}}}, "tasks.rte.batches is 0; it must be a whole number of at least"),
    "batches": ({"tasks": {"rte": {"batches": "many"}}}, "tasks.rte.batches is 'many'"),
    "key of a task": ({"tasks": {"rte": {"batches": 4, "flag": {}}}}, "unknown key 'flag'; did you mean flags?"),
    "task": ({"tasks": {"rtee": {"batches": 4}}}, "tasks: task 'rtee' is not one of ward_notes, boolq"),
    "model": (table(model="big"), "tables.table1: model 'big' is not one of tiny"),
    "adapter": (table(adapters=["Lora"]), "tables.table1: adapter 'Lora' is not one of prefix, lora"),
    "task of a table": (table(tasks=["wic"]), "tables.table1: task 'wic' is not one of rte, copa"),
    "method": (table(methods=["seriall"]), "tables.table1: method 'seriall' is not one of centralised, serial"),
    "no reference": (table(methods=["serial"]), "table1 has serial without centralised, which it is compared with"),
    "a name for a list": (table(tasks="rte"), r"tables.table1\[0\].tasks must be a list of names, not 'rte'"),
    "twice": (table(tasks=["rte", "rte"]), r"tables.table1\[0\].tasks has a name twice"),
    "no parts": ({"tables": {"table1": {}}}, "tables.table1 must be a list of parts"),
    "tuned task": ({"tuning": {**TUNING, "tasks": ["wic"]}}, "tuning: task 'wic' is not one of rte, copa"),
    "tuned adapter": ({"tuning": {**TUNING, "rates": {"Lora": [0.1]}}}, "tuning: adapter 'Lora' is not one of"),
    "rates": ({"tuning": {**TUNING, "rates": {"lora": 0.1}}}, "tuning.rates.lora must be a list of learning rates"),
}


@pytest.mark.parametrize("case", BAD_PRESETS)
def test_a_wrong_preset_is_refused_by_name_and_place(tmp_path: Path, case: str) -> None:
    changes, message = BAD_PRESETS[case]
    path = write_preset(tmp_path, content(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_preset(str(path), SHIPPED)
    assert str(caught.value).startswith(f"--preset {path} is no preset: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "written", ["", "3", "- a\n- b", "scale: [1\nseeds: }", "a: &b\nc: *d", "\x00", "when: 2020-13-45"]
)
def test_a_file_that_is_no_preset_is_refused_in_one_line(tmp_path: Path, written: str) -> None:
    path = write_preset(tmp_path, written)
    with pytest.raises(ConfigError) as caught:
        load_preset(str(path), SHIPPED)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_preset_with_a_date_for_a_number_is_refused(tmp_path: Path) -> None:
    path = write_preset(tmp_path, yaml.safe_dump(content()).replace("data.partition: iid", "data.alpha: 2020-01-01"))
    with pytest.raises(ConfigError, match=r"common: data.alpha is datetime.date.*; it must be text, a number"):
        load_preset(str(path), SHIPPED)


def test_an_unknown_preset_lists_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"--preset big is not known; choose one of .*small, smoke"):
        load_preset("big", SHIPPED)
    with pytest.raises(ConfigError, match=r"--preset big\.yaml is not known"):
        load_preset("big.yaml", SHIPPED)


def test_a_preset_of_ones_own_does_not_take_the_place_of_ours(tmp_path: Path) -> None:
    path = write_preset(tmp_path, content(), "smoke")
    with pytest.raises(ConfigError, match="would write over the results of our own smoke; rename the file"):
        load_preset(str(path), SHIPPED)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with two tasks' data."""
    for task, folder in (("rte", "superglue/RTE"), ("copa", "COPA")):
        for split in ("train", "val"):
            write_lines(tmp_path / "data" / folder / f"{split}.jsonl", *[RECORDS[task]] * 8)
    return tmp_path / "data"


def refused(tmp_path: Path, message: str, *, results: str = "results", **changes: Any) -> str:
    """What is wrong is said before any process is started, and nothing is written."""
    preset = preset_of(tmp_path, **changes)
    bench = Bench(
        root=tmp_path / "no code to run is here", results=tmp_path / results, data_dir=tmp_path / "data", preset=preset
    )
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BadInput, match=message) as caught:
        bench.run_all(jobs_of(cells_of(preset, ["table1"], [], [])))
    assert sorted(tmp_path.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("train.lerning_rate", 0.1, "unknown key train.lerning_rate; did you mean train.learning_rate"),
        ("lerning", 0.1, "unknown key lerning"),
        ("train.learning_rate", "fast", "train.learning_rate is fast; it must be float"),
        ("train.schedul", "serial", "unknown key train.schedul; did you mean train.schedule"),
        ("train.per_client_batch_size", 0, "--train.per_client_batch_size is 0; it must be at least 1"),
        ("model.name_or_path", "/no/such/model", "/no/such/model"),
        ("model.head_blocks", 9, "head_blocks"),
    ],
)
def test_a_wrong_flag_names_the_preset_and_the_key(
    data: Path, tmp_path: Path, flag: str, value: Any, message: str
) -> None:
    """Also where it is of the last task only: 50 runs before it would be lost time."""
    tasks = {"rte": {"batches": 4}, "copa": {"batches": 4, "flags": {flag: value}}}
    block = {**BLOCK, "tasks": ["rte", "copa"]}
    said = refused(tmp_path, message, tasks=tasks, tables={"table1": [block]})
    if "unknown" in message or "must be" in message:
        assert said.startswith("--preset mine: ")
        assert said.endswith("(in the flags of tiny-copa-lora-centralised-seed0)")


def test_a_missing_folder_is_named_with_all_that_was_looked_for(data: Path, tmp_path: Path) -> None:
    (data / "superglue").rename(data / "superduper")
    said = refused(tmp_path, "has no data of rte")
    assert said == (
        f"--data_dir {data} has no data of rte: looked for superglue/RTE/train.jsonl, RTE/train.jsonl; "
        "it holds COPA/, superduper/"
    )
    data.rename(tmp_path / "elsewhere")
    refused(tmp_path, f"--data_dir {data} is no folder; give the one that holds the data sets")


def test_a_missing_split_is_named(data: Path, tmp_path: Path) -> None:
    (data / "COPA" / "val.jsonl").unlink()
    refused(tmp_path, r"COPA \(--data.data_dir\) has no val.jsonl of copa: looked for .*it holds train.jsonl")


BROKEN_DATA = {
    "missing field": ({k: v for k, v in RECORDS["copa"].items() if k != "choice2"}, "no field 'choice2'"),
    "wrong label": ({**RECORDS["copa"], "label": 2}, "field 'label' is 2; it must be one of 0, 1"),
    "another task's": (RECORDS["rte"], "no field 'choice1'"),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", BROKEN_DATA)
def test_a_broken_record_is_named_by_task_file_line_and_field(
    data: Path, tmp_path: Path, case: str, split: str
) -> None:
    record, message = BROKEN_DATA[case]
    write_lines(data / "COPA" / f"{split}.jsonl", RECORDS["copa"], RECORDS["copa"], record)
    said = refused(tmp_path, message)
    assert said.startswith(f"copa, {data}/COPA/{split}.jsonl:3: ")


def test_an_empty_split_is_named(data: Path, tmp_path: Path) -> None:
    (data / "COPA" / "val.jsonl").write_text("\n")
    refused(tmp_path, r"COPA/val.jsonl \(--data.data_dir\) holds no records of copa")


def test_what_could_not_be_scored_is_not_run(data: Path, tmp_path: Path) -> None:
    tasks = {"rte": {"batches": 4, "flags": {"data.val_examples": 0}}}
    refused(tmp_path, "rte: data.val_examples is 0, so nothing would be scored", tasks=tasks, **table())
    for split in ("train", "val"):
        write_lines(data / "xsum" / f"{split}.jsonl", *[RECORDS["xsum"]] * 8)
    block = {**BLOCK, "tasks": ["xsum"]}
    message = "xsum: data.evaluate_by is likelihood, and texts are scored as generated"
    refused(tmp_path, message, tasks={"xsum": {"batches": 4}}, tables={"table1": [block]})


def test_a_question_that_does_not_fit_is_named_before_the_first_run(data: Path, tmp_path: Path) -> None:
    tasks = {"rte": {"batches": 4}, "copa": {"batches": 4, "flags": {"data.max_source_length": 40}}}
    block = {**BLOCK, "tasks": ["rte", "copa"]}
    said = refused(tmp_path, "more than --data.max_source_length 40", tasks=tasks, tables={"table1": [block]})
    assert said.startswith(f"copa, {data}/COPA/train.jsonl:")


@pytest.mark.parametrize("place", [0, 7])
def test_whichever_example_a_seed_draws_it_is_checked_before_the_first_run(
    data: Path, tmp_path: Path, place: int
) -> None:
    """One of each client's four is drawn; over ten seeds each of them is."""
    long = {**RECORDS["copa"], "premise": "long " * 60}
    records = [long if number == place else RECORDS["copa"] for number in range(8)]
    write_lines(data / "COPA" / "train.jsonl", *records)
    flags = {"data.max_source_length": 150, "data.max_train_examples": 1}
    tasks = {"rte": {"batches": 4}, "copa": {"batches": 4, "seeds": list(range(10)), "flags": flags}}
    refused(
        tmp_path,
        f"COPA/train.jsonl:{place + 1}.*more than",
        tasks=tasks,
        tables={"table1": [{**BLOCK, "tasks": ["copa"]}]},
    )


def test_results_that_cannot_be_written_are_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    refused(tmp_path, "--results_dir .*a file is a file; give a folder", results="a file")


@pytest.mark.parametrize(
    "written",
    ["", '{"format": 1, "job": ', "[1]", "null", '{"format": 1}', "\x00\x01"],
)
def test_a_result_that_is_broken_is_no_result(tmp_path: Path, written: str) -> None:
    preset = preset_of(tmp_path)
    bench = Bench(root=ROOT, results=tmp_path, data_dir=tmp_path, preset=preset)
    job = jobs_of(cells_of(preset, ["table1"], [], []))[0]
    assert not bench.is_done(job)
    bench.path(job).parent.mkdir(parents=True)
    bench.path(job).write_text(written, encoding="utf-8")
    assert not bench.is_done(job)
    with pytest.raises(DataError, match="delete it, and its run is done again"):
        raw.read(bench.path(job))


@pytest.fixture
def command() -> Iterator[Any]:
    """`main` of the script; the signals' handlers that it sets are put back."""
    spec = importlib.util.spec_from_file_location("reproduce", ROOT / "launch" / "reproduce.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    spec.loader.exec_module(module)
    yield module.main
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: what"),
        (["table9"], "invalid choice: 'table9'.*table1"),
        (["table3", "--preset", "smoke", "--tasks", "rte"], "--tasks rte is not in table3; choose of ward_notes"),
        (["table1", "--jobs", "0"], "--jobs is 0; it must be at least 1"),
        (["table1", "--jobs", "two"], "invalid int value: 'two'"),
        (["table1", "--seeds", "-1"], r"--seeds is \[-1\]"),
        (["table1", "--seed", "1"], "unrecognized arguments: --seed"),
        (["table1", "--preset", "smoke", "--tasks", "xsum"], "--tasks xsum is not in table1; choose of rte, copa"),
        (["table1", "folder"], "table1 folder: a run's folder is for score"),
        (["efficiency", "--tasks", "rte"], "efficiency is of no single task or seed; leave out --tasks"),
        (["score"], "score needs the folder of a run"),
        (["score", "/no/such/folder"], r"/no/such/folder has no config\.yaml"),
    ],
)
def test_a_wrong_command_line_is_refused(command: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        command(arguments)
    assert "\n" not in str(caught.value)


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ["table1", "--preset", "smoke", "--data_dir", str(tmp_path), "--results_dir", str(tmp_path / "results")]
    script = [sys.executable, str(ROOT / "launch" / "reproduce.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: --data_dir {tmp_path} has no data of rte: looked for superglue/RTE/train.jsonl"
    )
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
