"""Running a table's runs: each once, whoever else is at it; what fails says why; what was cut off is gone on with.

The runs here are a script of a few lines that leaves what a run leaves; tests/multiprocess has real ones.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpc.reproduce import raw
from hpc.reproduce.plan import Job, cells_of, jobs_of, tuning_jobs
from hpc.reproduce.run import Bench, RunFailed
from tests.unit.preset_case import ROOT, content, preset_of, write_preset
from tests.unit.task_records import RECORDS, write_lines

DEADLINE_S = 30
RUN = """
import json, os, sys, time
from pathlib import Path

flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder = Path(flags["--run.output_dir"])
here = Path(__file__).parent
with (here / "told").open("a") as file:
    file.write(json.dumps([folder.name, os.getpid(), sys.argv[1:], sorted(p.name for p in folder.glob("*"))]) + "\\n")
wish = json.loads((here / "wishes.json").read_text()).get(folder.name, {})
print("a line\\n" + wish.get("says", "well"), flush=True)
time.sleep(wish.get("sleeps", 0.3))
if wish.get("code"):
    sys.exit(wish["code"])
steps = int(flags["--train.max_steps"])
line = {"kind": "labels", "choices": ["Yes", "No"], "chosen": 0, "right": ["Yes"], "decoded": None, "question": None}
for client in range(2):
    for step in (0, steps):
        path = folder / "roles" / "centralised" / f"predictions-{step}-client-{client}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not wish.get("silent"):
            path.write_text(json.dumps(line) + "\\n")
more = ("step_seconds", "seconds_per_step", "link_bytes_per_step", "peak_rss_mib", "parameters", "versions")
summary = {"steps": steps, "eval": {"loss": 1.0, "loss_before": 2.0}, "losses": [1.0] * steps}
summary |= {"git_commit": None, "machine": {}}
(folder / "summary.json").write_text(json.dumps({**summary, **dict.fromkeys(more, {})}))
"""
BLOCK = {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": ["centralised", "centralised_union"]}
ONE, OTHER = "tiny-rte-lora-centralised-seed0", "tiny-rte-lora-centralised_union-seed0"
CHANGES: dict[str, Any] = {"seeds": [0], "tasks": {"rte": {"batches": 4}}, "tables": {"table1": [BLOCK]}}


class Place:
    """A repository whose only script pretends to be a run."""

    def __init__(self, folder: Path, keys: Path) -> None:
        self.folder, self.said = folder, list[str]()
        (folder / "launch").mkdir()
        (folder / "launch" / "local.py").write_text(RUN)
        self.wish()
        write_lines(folder / "data" / "RTE" / "train.jsonl", *[RECORDS["rte"]] * 8)
        write_lines(folder / "data" / "RTE" / "val.jsonl", *[RECORDS["rte"]] * 8)
        shutil.copytree(keys, folder / "results" / "runs" / "reproduce" / "keys")

    def wish(self, **wishes: Any) -> None:
        (self.folder / "launch" / "wishes.json").write_text(json.dumps(wishes))

    def bench(self, **changes: Any) -> tuple[Bench, list[Job]]:
        preset = preset_of(self.folder, **CHANGES | changes)
        results, data = self.folder / "results", self.folder / "data"
        bench = Bench(root=self.folder, results=results, data_dir=data, preset=preset, at_once=2, say=self.said.append)
        return bench, jobs_of(cells_of(preset, ["table1"], [], []))

    @property
    def runs(self) -> list[tuple[str, int, list[str], list[str]]]:
        """Name, process, flags and what was in the folder already, of each run that was started."""
        path = self.folder / "launch" / "told"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def started(self, count: int) -> None:
        eventually(lambda: len(self.runs) >= count)

    @property
    def names(self) -> list[str]:
        return [name for name, *_ in self.runs]


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def place(tmp_path: Path, pristine_keys: Path) -> Place:
    return Place(tmp_path, pristine_keys)


def test_what_is_done_is_not_run_again_unless_its_settings_are_others(place: Place) -> None:
    bench, jobs = place.bench()
    bench.run_all(jobs)
    assert sorted(place.names) == [ONE, OTHER]
    assert all(bench.is_done(job) for job in jobs)
    place.bench()[0].run_all(jobs)
    assert len(place.runs) == 2
    bench, jobs = place.bench(tasks={"rte": {"batches": 8}})
    bench.run_all(jobs[:1])
    assert place.names[2:] == [ONE]
    assert len(raw.read(bench.path(jobs[0]))["losses"]) == 8


def test_a_broken_result_is_made_again(place: Place) -> None:
    bench, jobs = place.bench()
    bench.run_all(jobs)
    text = bench.path(jobs[0]).read_text()
    bench.path(jobs[0]).write_text(text[: len(text) // 2])
    place.bench()[0].run_all(jobs)
    assert place.names[2:] == []  # what the run left is still there
    assert raw.read(bench.path(jobs[0]))["fingerprint"] == jobs[0].fingerprint
    bench.path(jobs[0]).write_text("{}")
    shutil.rmtree(bench.folder / ONE)
    place.bench()[0].run_all(jobs)
    assert place.names[2:] == [ONE]


def test_other_data_is_another_result(place: Place) -> None:
    bench, jobs = place.bench()
    bench.run_all(jobs)
    (path,) = place.folder.rglob("val.jsonl")
    write_lines(path, *[RECORDS["rte"]] * 9)
    assert not any(place.bench()[0].is_done(job) for job in jobs)
    place.bench()[0].run_all(jobs)
    assert len(place.names) == 4
    path.unlink()
    assert all(place.bench()[0].is_done(job) for job in jobs)  # nobody can tell without


def test_a_run_that_fails_says_why_and_ends_the_others(place: Place) -> None:
    place.wish(**{ONE: {"sleeps": 60}, OTHER: {"code": 1, "says": "run ended: no more memory"}})
    bench, jobs = place.bench()
    with pytest.raises(RunFailed) as caught:
        bench.run_all(jobs)
    log = bench.folder / f"{OTHER}.log"
    assert str(caught.value) == f"{OTHER} ended with exit code 1: run ended: no more memory (all of it: {log})"
    assert log.read_text() == "a line\nrun ended: no more memory\n"
    assert caught.value.exit_code == 1
    assert not any(is_alive(pid) for _, pid, *_ in place.runs)
    assert not list((place.folder / "results").rglob("raw/**/*.json"))
    place.wish()
    place.bench()[0].run_all(jobs)
    assert sorted(place.names[2:]) == [ONE, OTHER]


def test_a_run_that_finds_its_input_bad_is_the_users_to_mend(place: Place) -> None:
    place.wish(**{ONE: {"code": 2, "says": "error: no"}})
    bench, jobs = place.bench()
    with pytest.raises(RunFailed, match="exit code 2: error: no ") as caught:
        bench.run_all(jobs[:1])
    assert caught.value.exit_code == 2


def test_a_run_without_predictions_has_no_result(place: Place) -> None:
    place.wish(**{ONE: {"silent": True}})
    bench, jobs = place.bench()
    with pytest.raises(RunFailed, match=f"{ONE} ended well, but predictions cannot be read.*{ONE}.log"):
        bench.run_all(jobs[:1])
    assert not bench.is_done(jobs[0])


def test_a_result_that_cannot_be_written_ends_in_one_line(place: Place) -> None:
    bench, jobs = place.bench()
    bench.path(jobs[0]).mkdir(parents=True)
    with pytest.raises(RunFailed, match=f"{ONE}: its files in .*results cannot be written: .*Is a directory"):
        bench.run_all(jobs[:1])


def test_two_at_the_same_table_share_it(place: Place) -> None:
    place.wish(**{ONE: {"sleeps": 1.5}, OTHER: {"sleeps": 1.5}})
    (first, jobs), (second, _) = place.bench(), place.bench()
    threads = [threading.Thread(target=each.run_all, args=(jobs,)) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sorted(place.names) == [ONE, OTHER]
    assert all(first.is_done(job) for job in jobs)
    assert any(line.startswith("waiting for what another process is at (") for line in place.said)


def test_what_another_process_leaves_undone_is_taken_over(place: Place) -> None:
    bench, jobs = place.bench()
    bench.folder.mkdir(parents=True)
    with (bench.folder / f".{ONE}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=bench.run_all, args=(jobs,))
        thread.start()
        eventually(lambda: f"waiting for what another process is at (1): {ONE}" in place.said)
        assert place.names == [OTHER]
    thread.join(DEADLINE_S)
    assert place.names == [OTHER, ONE]


COMMAND = """
import sys
from pathlib import Path
from hpc.reproduce.plan import cells_of, jobs_of
from hpc.reproduce.preset import load_preset
from hpc.reproduce.run import Bench

folder = Path(sys.argv[1])
preset = load_preset(str(folder / "mine.yaml"), folder)
bench = Bench(root=folder, results=folder / "results", data_dir=folder / "data", preset=preset, at_once=2)
bench.run_all(jobs_of(cells_of(preset, ["table1"], [], [])))
"""


def test_a_run_whose_command_was_killed_is_left_alone_while_it_lives(place: Place) -> None:
    place.wish(**{ONE: {"sleeps": 60}, OTHER: {"sleeps": 60}})
    write_preset(place.folder, content(**CHANGES))
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(place.folder)], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        place.started(2)
        command.kill()
        command.wait(DEADLINE_S)
        pids = {name: pid for name, pid, *_ in place.runs}
        assert all(is_alive(pid) for pid in pids.values())
        place.wish()
        bench, jobs = place.bench()
        thread = threading.Thread(target=bench.run_all, args=(jobs,))
        thread.start()
        eventually(lambda: any(line.startswith("waiting for") for line in place.said))
        assert len(place.runs) == 2
    finally:
        command.kill()
        for _, pid, *_ in place.runs[:2]:
            os.kill(pid, signal.SIGKILL)
    thread.join(DEADLINE_S)
    assert sorted(place.names[2:]) == [ONE, OTHER]
    assert all(bench.is_done(job) for job in jobs)


@pytest.mark.parametrize("settings", ["the same", "others"])
def test_only_a_run_of_the_same_settings_goes_on_from_its_checkpoint(place: Place, settings: str) -> None:
    bench, jobs = place.bench()
    folder = bench.folder / ONE
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "manifest.json").write_text("{}")
    told = f"{jobs[0].fingerprint} {bench.digest(jobs[0])}"
    (bench.folder / f"{ONE}.settings").write_text(told if settings == "the same" else "others")
    bench.run_all(jobs[:1])
    ((_, _, flags, found),) = place.runs
    assert ("--run.resume_from_checkpoint" in flags) == (settings == "the same")
    assert not list(folder.glob("checkpoint-*")), "a run that is done needs none"
    assert found == (["checkpoint-2"] if settings == "the same" else [])
    assert "resume" not in raw.read(bench.path(jobs[0]))["command"]


def test_half_a_run_is_removed_before_it_is_done_again(place: Place) -> None:
    bench, jobs = place.bench()
    (bench.folder / ONE / "roles").mkdir(parents=True)
    bench.run_all(jobs[:1])
    ((_, _, _, found),) = place.runs
    assert found == []


def test_each_run_has_its_own_log(place: Place) -> None:
    """Also where its name ends in .001 or .003."""
    tuning = {"model": "tiny", "tasks": ["rte"], "rates": {"lora": [0.001, 0.003]}}
    bench, _ = place.bench(tuning=tuning)
    jobs = tuning_jobs(bench.preset)
    place.wish(**{job.name: {"says": job.name} for job in jobs})
    bench.run_all(jobs)
    for job in jobs:
        assert (bench.folder / f"{job.name}.log").read_text() == f"a line\n{job.name}\n"


def test_a_file_says_how_somebody_else_makes_it(place: Place) -> None:
    bench, jobs = place.bench()
    bench.run_all(jobs[:1])
    found = raw.read(bench.path(jobs[0]))
    assert str(place.folder) not in json.dumps(found)
    assert found["command"].startswith("python launch/local.py --data.task rte --train.clients 2")
    assert " --data.data_dir data/RTE --run.output_dir results/runs/reproduce/mine/" in found["command"]
    assert (found["metrics"], found["examples"]) == ({"accuracy": 100.0, "unparsed": 0}, 2)
    assert (found["eval_loss"], found["eval_loss_before"]) == (1.0, 2.0)
