"""Running what a table needs: each run is `launch/local.py` as anybody would type it, then its committed file."""

from __future__ import annotations

import hashlib
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import yaml

from hpc.config import Config
from hpc.data.folders import file_in
from hpc.errors import BadInput, DataError, HpcError, Paused
from hpc.files import try_lock
from hpc.link.identity import ensure_local
from hpc.preflight import check_folder
from hpc.report.provenance import without_folders
from hpc.reproduce import raw
from hpc.reproduce.attacked import attacks_on, drop_recordings, options_of
from hpc.reproduce.check import check_configs, configs_of, folder_of
from hpc.reproduce.plan import Job
from hpc.reproduce.preset import Preset
from hpc.reproduce.processes import Processes
from hpc.reproduce.tuning_data import divide

POLL_S = 1.0
SCRIPT = "launch/local.py"
# What a run writes beside its result is for whoever watches one run; here there are hundreds.
QUIETLY = ("--run.report_to", "[]", "--run.save_adapter", "false")


# A preset's flags may say where a task's data comes from; else it is in a folder of `--data_dir`.
OWN_SOURCE = {"data.data_dir", "data.train_file", "data.hub_name", "data.train_examples"}


class RunFailed(HpcError):
    """A run of a table ended with an error; carries its exit code where that says more than 1."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = code if code in (BadInput.exit_code, Paused.exit_code) else 1


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
    say: Callable[[str], None] = field(default_factory=lambda: partial(print, flush=True))
    _given: dict[str, list[str]] = field(default_factory=dict)
    """Run → its flags; once, as a part of the data may have to be written for them."""
    _configs: dict[str, Config] = field(default_factory=dict)
    _digests: dict[str, str | None] = field(default_factory=dict)
    _processes: Processes = field(default_factory=Processes)

    @property
    def folder(self) -> Path:
        """Where the runs themselves write; not committed."""
        return self.results / "runs" / "reproduce" / self.preset.name

    def path(self, job: Job) -> Path:
        return raw.raw_path(self.results, self.preset.name, job)

    def is_done(self, job: Job) -> bool:
        """Whether the job's file is there, whole, of the same settings, and of the data that is here (if there is)."""
        try:
            found = raw.read(self.path(job)) if self.path(job).exists() else {}
        except BadInput:
            return False
        return found.get("fingerprint") == job.fingerprint and self.digest(job) in (None, found["data_sha256"])

    def digest(self, job: Job) -> str | None:
        """Of the files that a task is learnt from and scored on; None where they are not here, or not in a folder."""
        if job.task not in self._digests:
            try:
                folder = folder_of(self.data_dir, self.preset.tasks[job.task].folder, job.task)
                files = [file_in(folder, job.task, split) for split in ("train", "val")]
                found = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files))
                self._digests[job.task] = found.hexdigest()
            except (BadInput, OSError):
                self._digests[job.task] = None
        return None if OWN_SOURCE & job.flags.keys() else self._digests[job.task]

    def run_all(self, jobs: Sequence[Job]) -> None:
        """Every job that is not done, some at once. What another process is at is waited for, or done if that one dies.

        Raises a `BadInput` error before the first run where a run could not work; `RunFailed` at the first that fails:
        what is under way ends with it, and what is done stays.
        """
        todo = [job for job in jobs if not self.is_done(job)]
        self.say(f"{len(jobs)} runs, {len(jobs) - len(todo)} done already")
        if todo:
            for job in todo:
                options_of(self.preset.name, job)
            self._prepare(todo)
            self._run(todo)

    def _prepare(self, todo: Sequence[Job]) -> None:
        """Find what is wrong before work begins."""
        check_folder("--results_dir", self.results)
        self._given = {job.name: self._flags(job) for job in todo}
        self._configs = configs_of(self.preset.name, self._given)
        check_configs(self._configs.values())
        ensure_local(self._keys, max(config.train.clients for config in self._configs.values()))

    def _run(self, todo: Sequence[Job]) -> None:
        places = {job.name: f"{n}/{len(todo)}" for n, job in enumerate(todo, start=1)}
        with ThreadPoolExecutor(self.at_once) as pool:
            try:
                told = ""
                # No deadline: another process's runs have those of their roles, and may rightly take days.
                while todo := self._round(pool, todo, places):
                    names = ", ".join(job.name for job in todo)
                    if names != told:
                        self.say(f"waiting for what another process is at ({len(todo)}): {names}")
                    told = names
                    time.sleep(POLL_S)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self._processes.end(self.say)

    def _round(self, pool: ThreadPoolExecutor, todo: Sequence[Job], places: Mapping[str, str]) -> Sequence[Job]:
        """Each job once; returns those that another process is at."""
        running = {pool.submit(self._one, job, places[job.name]): job for job in todo}
        waiting = set(running)
        while waiting:
            ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for each in ended:
                each.result()
        return [job for each, job in running.items() if not each.result()]

    def _one(self, job: Job, place: str) -> bool:
        """Whether the job is done, or nothing more is to be done."""
        try:
            return self._do(job, place)
        except OSError as error:
            raise RunFailed(f"{job.name}: its files in {self.results} cannot be written: {error}") from None

    def _do(self, job: Job, place: str) -> bool:
        with self._claimed(job) as lock:
            if lock is None:
                return False
            if self._processes.ended or self.is_done(job):
                return True
            begin = time.monotonic()
            flags, folder = self._given[job.name], self.folder / job.name
            if not self._start(job, flags, folder, lock):
                return True
            content = self._record(job, flags, folder, time.monotonic() - begin)
            raw.write(self.path(job), content)
            _drop_checkpoints(folder)
            drop_recordings(folder)
            self.say(f"[{place}] {job.name}: {_told(content)} ({content['seconds']:.0f} s)")
            return True

    def _record(self, job: Job, flags: list[str], folder: Path, seconds: float) -> dict[str, Any]:
        command = shlex.join(["python", SCRIPT, *self._without_folders(flags)])
        config, preset, data = self._configs[job.name], self.preset, self.digest(job)
        try:
            content = raw.record(
                job, preset.name, preset.scale, config, folder, command=command, seconds=seconds, data=data
            )
            return content | (
                {"attacks": attacks_on(preset.name, job, folder, lambda: self._processes.ended)} if job.attacks else {}
            )
        except DataError as error:
            raise RunFailed(f"{job.name} ended well, but {error} (its output: {_beside(folder, 'log')})") from None

    def _start(self, job: Job, flags: list[str], folder: Path, lock: IO[str]) -> bool:
        """Run to the end; False if this command is ended meanwhile. The run holds the lock, in case it survives us."""
        log, settings = _beside(folder, "log"), _beside(folder, "settings")
        told = f"{job.fingerprint} {self.digest(job)}"
        if _is_of(settings, told) and (folder / "summary.json").exists():
            return True  # it ended after the command that started it did
        if _is_of(settings, told) and any(folder.glob("checkpoint-*/manifest.json")):
            flags = [*flags, "--run.resume_from_checkpoint", "latest"]
        else:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off, or of other settings
            settings.write_text(told, encoding="utf-8")
        code = self._processes.run([sys.executable, str(self.root / SCRIPT), *flags], log, hand_down=lock.fileno())
        if code and not self._processes.ended:
            raise RunFailed(f"{job.name} ended with exit code {code}: {_last_line(log)} (all of it: {log})", code)
        return code == 0

    @contextmanager
    def _claimed(self, job: Job) -> Iterator[IO[str] | None]:
        """A lock if the job is this process's to do: two of them may work at one preset."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".{job.name}.lock").open("w") as lock:
            yield lock if try_lock(lock) else None

    @property
    def _keys(self) -> Path:
        return self.results / "runs" / "reproduce" / "keys"

    def _flags(self, job: Job) -> list[str]:
        flags = [text for key, value in job.flags.items() for text in (f"--{key}", as_flag(value))]
        folder, keys = ("--run.output_dir", str(self.folder / job.name)), ("--link.keys_dir", str(self._keys))
        return [*flags, *self._data(job), *folder, *keys, *QUIETLY]

    def _data(self, job: Job) -> tuple[str, ...]:
        if not job.tuning and not OWN_SOURCE.isdisjoint(job.flags):
            return ()
        folder = folder_of(self.data_dir, self.preset.tasks[job.task].folder, job.task)
        if not job.tuning:
            return ("--data.data_dir", str(folder))
        part = divide(folder, self.folder / "tuning-data" / job.task)
        return ("--data.train_file", str(part / "train.jsonl"), "--data.val_file", str(part / "val.jsonl"))

    def _without_folders(self, flags: list[str]) -> list[str]:
        """The command as somebody else would type it, who has the data in `data`."""
        here = {self.data_dir: Path("data"), self.results: Path("results")}
        for folder, name in here.items():
            flags = [
                str(name / Path(flag).relative_to(folder)) if Path(flag).is_relative_to(folder) else flag
                for flag in flags
            ]
        return [without_folders(flag) for flag in flags]


def _is_of(settings: Path, told: str) -> bool:
    """Whether what lies there is of these very settings and data."""
    return settings.is_file() and settings.read_text(encoding="utf-8") == told


def _drop_checkpoints(folder: Path) -> None:
    """Of a run that is done: nothing goes on from them, and hundreds of runs' would fill a disc."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def _beside(folder: Path, ending: str) -> Path:
    """A file beside a run's folder; its name may have points in it."""
    return folder.with_name(f"{folder.name}.{ending}")


def as_flag(value: Any) -> str:
    """A YAML value as the command line has it."""
    if value is None or isinstance(value, (bool, list, dict)):
        return str(yaml.safe_dump(value, default_flow_style=True)).removesuffix("...\n").strip()
    return str(value)


def _told(content: dict[str, Any]) -> str:
    (name, value), *_ = content["metrics"].items()
    return f"{name} {value:.1f}, loss {content['eval_loss']:.3f}"


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
