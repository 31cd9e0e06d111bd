"""Running what a table needs: each run is `launch/local.py` as anybody would type it, then its committed file."""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

from hpc.cli import make_parser, parse
from hpc.config import Config
from hpc.errors import BadInput, HpcError
from hpc.link.identity import ensure_local
from hpc.reproduce import raw
from hpc.reproduce.plan import Job
from hpc.reproduce.preset import Preset
from hpc.reproduce.tuning_data import divide

GRACE_S = 20.0  # for a run that is told to end
SCRIPT = "launch/local.py"
# What a run writes beside its result is for whoever watches one run; here there are hundreds.
QUIETLY = ("--run.report_to", "[]", "--run.save_adapter", "false")


class RunFailed(HpcError):
    """A run of a table ended with an error."""


@dataclass(kw_only=True)
class Bench:
    """Where runs are done."""

    root: Path
    """Of the repository."""
    results: Path
    data_dir: Path
    preset: Preset
    at_once: int = 1
    """Runs at the same time."""
    say: Callable[[str], None] = print
    _processes: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _ended: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> Path:
        """Where the runs themselves write; not committed."""
        return self.results / "runs" / "reproduce" / self.preset.name

    def path(self, job: Job) -> Path:
        return raw.raw_path(self.results, self.preset.name, job)

    def is_done(self, job: Job) -> bool:
        """Whether the job's file is there, whole, and of the same settings."""
        try:
            return self.path(job).exists() and raw.read(self.path(job))["fingerprint"] == job.fingerprint
        except BadInput:
            return False

    def run_all(self, jobs: Sequence[Job]) -> None:
        """Every job that is not done, some at once. What another process is at, is left to it.

        Raises `RunFailed` at the first that fails; what is under way ends with it, and what is done stays.
        """
        todo = [job for job in jobs if not self.is_done(job)]
        self.say(f"{len(jobs)} runs, {len(jobs) - len(todo)} done already")
        ensure_local(self._keys, max((self._config(job).train.clients for job in todo), default=1))
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                running = {pool.submit(self._one, job, f"{n}/{len(todo)}") for n, job in enumerate(todo, start=1)}
                while running:
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in ended:
                        each.result()
            finally:
                self._ended.set()
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()

    def _one(self, job: Job, place: str) -> None:
        with self._claimed(job) as mine:
            if self._ended.is_set() or not mine or self.is_done(job):
                return
            begin = time.monotonic()
            flags, config = self._flags(job), self._config(job)
            folder = self.folder / job.name
            self._start(job, flags, folder)
            command = shlex.join(["python", SCRIPT, *self._without_folders(flags)])
            seconds = time.monotonic() - begin
            content = raw.record(
                job, self.preset.name, self.preset.scale, config, folder, command=command, seconds=seconds
            )
            raw.write(self.path(job), content)
            self.say(f"[{place}] {job.name}: {_told(content)} ({seconds:.0f} s)")

    def _start(self, job: Job, flags: list[str], folder: Path) -> None:
        resumes = any(folder.glob("checkpoint-*/manifest.json")) and not (folder / "summary.json").exists()
        if resumes:
            flags = [*flags, "--run.resume_from_checkpoint", "latest"]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off, or of other settings
        folder.parent.mkdir(parents=True, exist_ok=True)
        log = folder.with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, str(self.root / SCRIPT), *flags],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.add(process)
        code = process.wait()
        self._processes.discard(process)
        if code and not self._ended.is_set():
            raise RunFailed(f"{job.name} ended with exit code {code}: {_last_line(log)} (all of it: {log})")

    @contextmanager
    def _claimed(self, job: Job) -> Iterator[bool]:
        """Whether the job is this process's to do: two of them may work at one preset."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{job.name}.lock").open("w") as lock:
            yield _locked(lock)

    @property
    def _keys(self) -> Path:
        return self.results / "runs" / "reproduce" / "keys"

    def _config(self, job: Job) -> Config:
        return parse(make_parser(""), self._flags(job))[0]

    def _flags(self, job: Job) -> list[str]:
        flags = [text for key, value in job.flags.items() for text in (f"--{key}", as_flag(value))]
        folder, keys = ("--run.output_dir", str(self.folder / job.name)), ("--link.keys_dir", str(self._keys))
        return [*flags, *self._data(job), *folder, *keys, *QUIETLY]

    def _data(self, job: Job) -> tuple[str, ...]:
        folder = self.data_dir / self.preset.tasks[job.task].folder
        if not job.tuning:
            return ("--data.data_dir", str(folder))
        part = self.folder / "tuning-data" / job.task
        if not (part / "train.jsonl").exists():
            divide(folder, part)
        return ("--data.train_file", str(part / "train.jsonl"), "--data.val_file", str(part / "val.jsonl"))

    def _without_folders(self, flags: list[str]) -> list[str]:
        """The command as somebody else would type it, who has the data in `data`."""
        here = {str(self.data_dir): "data", str(self.results): "results"}
        for folder, name in here.items():
            flags = [name + flag.removeprefix(folder) if flag.startswith(f"{folder}/") else flag for flag in flags]
        return flags

    def _stop(self) -> None:
        """Nothing outlives the command; a launcher that is told to end ends its roles."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = [process for process in self._processes if process.poll() is None]
            for process in alive:
                os.killpg(process.pid, number)
            deadline = time.monotonic() + GRACE_S
            while any(process.poll() is None for process in alive) and time.monotonic() < deadline:
                time.sleep(0.1)


def as_flag(value: Any) -> str:
    """A YAML value as the command line has it."""
    if value is None or isinstance(value, (bool, list, dict)):
        return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
    return str(value)


def _locked(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(content: dict[str, Any]) -> str:
    (name, value), *_ = content["metrics"].items()
    return f"{name} {value:.1f}, loss {content['eval_loss']:.3f}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
