"""A table by its one command, in real processes: cut off, gone on with by two commands at once, and done once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hpc.reproduce.score_command import scores_of
from tests.runs import ROOT, Finished, clean_environment, run_command
from tests.unit.preset_case import content, write_preset
from tests.unit.task_records import RECORDS, write_lines

SCRIPT = str(ROOT / "launch" / "reproduce.py")
RUNS = ("tiny-rte-lora-centralised-seed0", "tiny-rte-lora-serial-seed0")
BATCHES = 50
DEADLINE_S = 90


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset and its data."""
    folder = tmp_path_factory.mktemp("table")
    labels = ["entailment", "not_entailment"] * 8
    records = [{**RECORDS["rte"], "hypothesis": f"Ada sells {n}.", "label": each} for n, each in enumerate(labels)]
    for split in ("train", "val"):
        write_lines(folder / "data" / "RTE" / f"{split}.jsonl", *records)
    block = {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": ["centralised", "serial"]}
    tasks = {"rte": {"batches": BATCHES, "flags": {"train.per_client_batch_size": 1}}}
    write_preset(folder, content(seeds=[0], tasks=tasks, tables={"table1": [block]}))
    return folder


def command(place: Path) -> list[str]:
    folders = ["--data_dir", str(place / "data"), "--results_dir", str(place / "results")]
    return [sys.executable, SCRIPT, "table1", "--preset", str(place / "mine.yaml"), "--jobs", "2", *folders]


def started(place: Path) -> subprocess.Popen[str]:
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    # Tests that a shell runs in its background ignore SIGINT, and so would what they start.
    given["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command(place), env=clean_environment(), start_new_session=True, **given)


def left_over(place: Path) -> list[str]:
    """Command lines of this test's processes that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(place) in line:
            found.append(line)
    return found


def ended(processes: list[subprocess.Popen[str]]) -> list[Finished]:
    """What they said; none is left, whatever happens."""
    try:
        told = [process.communicate(timeout=DEADLINE_S) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(DEADLINE_S)
    each = zip(processes, told, strict=True)
    return [Finished(code=process.returncode, out=out, err=err, folder=Path()) for process, (out, err) in each]


def run_folder(place: Path, name: str) -> Path:
    return place / "results" / "runs" / "reproduce" / "mine" / name


def raw_files(place: Path) -> dict[str, Any]:
    """Run → its file's content."""
    return {path.stem: json.loads(path.read_text()) for path in (place / "results" / "raw").rglob("*.json")}


@dataclass(kw_only=True)
class CutOff:
    """What there was after the first command had been interrupted."""

    command: Finished
    left_over: list[str]
    done: list[str]
    checkpoints: int


@pytest.fixture(scope="module")
def cut_off(place: Path) -> CutOff:
    """A command that is interrupted when the trunk has stepped."""
    process = started(place)
    try:
        deadline = time.monotonic() + DEADLINE_S
        trunk = run_folder(place, RUNS[1]) / "roles" / "trunk-0" / "metrics.jsonl"
        while not (trunk.exists() and '"step"' in trunk.read_text()):
            assert time.monotonic() < deadline, f"no step in {trunk}"
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    finally:
        (told,) = ended([process])
    manifests = run_folder(place, RUNS[1]).glob("checkpoint-*/manifest.json")
    return CutOff(command=told, left_over=left_over(place), done=list(raw_files(place)), checkpoints=len([*manifests]))


@pytest.fixture(scope="module")
def done(place: Path, cut_off: CutOff) -> list[str]:
    """What two commands said that were started at the same time, to go on with it."""
    both = ended([started(place) for _ in range(2)])
    assert [(each.code, each.err) for each in both] == [(0, "")] * 2
    assert not left_over(place)
    return [each.out for each in both]


def test_an_interrupted_command_leaves_a_checkpoint_and_no_process(cut_off: CutOff) -> None:
    assert (cut_off.command.code, cut_off.command.err) == (130, "error: interrupted\n")
    assert cut_off.left_over == []
    assert cut_off.checkpoints == 1
    assert RUNS[1] not in cut_off.done


def test_what_is_left_is_done_once_by_one_of_two_commands(place: Path, cut_off: CutOff, done: list[str]) -> None:
    said = [line for out in done for line in out.splitlines()]
    for name in RUNS:
        assert len([line for line in said if f" {name}: " in line]) == (name not in cut_off.done)
    assert any(line.startswith("waiting for what another process is at") for line in said)
    assert sorted(raw_files(place)) == list(RUNS)
    assert "going on from checkpoint-" in (run_folder(place, RUNS[1]) / "logs" / "trunk-0.log").read_text()


def test_the_cut_model_learns_and_predicts_as_the_uncut_one_to_the_bit(place: Path, done: list[str]) -> None:
    """Also where the one was interrupted at another step than the other."""
    uncut, cut = (raw_files(place)[name] for name in RUNS)
    assert len(set(cut["losses"])) > BATCHES / 2
    assert len(cut["losses"]) == BATCHES
    for key in ("losses", "predictions", "metrics", "eval_loss", "examples"):
        assert cut[key] == uncut[key], key
    assert uncut["metrics_before"] is not None
    assert cut["examples"] == 16


def test_a_file_is_traceable_and_tells_nothing_of_this_machines_folders(place: Path, done: list[str]) -> None:
    for found in raw_files(place).values():
        assert str(place) not in json.dumps(found)
        assert found["command"].startswith("python launch/local.py --data.task rte ")
        assert "--data.data_dir data/RTE " in found["command"]


def test_what_is_done_is_not_done_again(place: Path, done: list[str]) -> None:
    folders = place / "results" / "runs", place / "results" / "raw"

    def times() -> dict[Path, int]:
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    again = run_command(command(place), place, timeout_s=DEADLINE_S)
    assert (again.code, again.err) == (0, "")
    assert "2 runs, 2 done already" in again.out
    assert times() == before


def test_score_says_what_the_table_says(place: Path, done: list[str]) -> None:
    accuracy = raw_files(place)[RUNS[1]]["metrics"]["accuracy"]
    last = scores_of(run_folder(place, RUNS[1])).splitlines()[-1]
    assert last.split() == [str(BATCHES), f"{accuracy:.2f}", "0", "16"]
