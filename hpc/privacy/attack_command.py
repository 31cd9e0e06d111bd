"""`launch/attack.py`: a run with recordings, if none is given, then the attack on it; or one that steers a run."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hpc.config import Config
from hpc.errors import ConfigError, HpcError
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attack_live import attack_live, check_steered
from hpc.privacy.attack_result import AttackResult
from hpc.privacy.attack_run import attack_run
from hpc.privacy.attacks.registry import method_of
from hpc.rendezvous import made_up_folder
from hpc.schedule import clients_of_step, total_steps

OWN = "--attack."
_GRACE_S = 20.0  # for a run that is interrupted to end its roles


def run_flags(arguments: Sequence[str]) -> list[str]:
    """The flags that are the run's: all but `--attack.…` and their values."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if not word.startswith(OWN):
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def attacked(config: Config, options: AttackConfig, flags: Sequence[str], local: Path) -> tuple[AttackResult, Path]:
    """What came of the attack, and where it is to be written. Raises as `folder_to_attack` and the attacks do."""
    method = method_of(options.method)
    if not method.steers:
        folder = folder_to_attack(config, options, flags, local)
        return attack_run(folder, options), folder
    if options.run_folder is not None:
        method.runner()  # which says that a run that was made is of no use
    _check_clients(config, options)
    check_steered(config, options)
    folder = Path(config.run.folder or made_up_folder(config))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds a run already, and {options.method} makes one; give another --run.output_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return attack_live(config, options, folder), folder


def folder_to_attack(config: Config, options: AttackConfig, flags: Sequence[str], local: Path) -> Path:
    """The run's folder; without one, `local` (launch/local.py) makes the run that `flags` describe, with recordings.

    Raises `ConfigError` for a folder and flags of a run, or a colluder that the run would not have.
    """
    if options.run_folder is not None:
        if flags:
            raise ConfigError(f"{flags[0]} describes a run, but --attack.run_folder names one that was made; give one")
        return Path(options.run_folder)
    _check_clients(config, options)
    folder = Path(config.run.folder or made_up_folder(config))
    steps = config.privacy.record_steps or steps_to_record(config, options)
    more = ["--privacy.record_steps", str(steps), "--run.output_dir", str(folder)]
    _make_run([sys.executable, str(local), *flags, *more])
    return folder


def steps_to_record(config: Config, options: AttackConfig) -> int:
    """Enough for the rows that are asked for; all steps where an attack learns from them, or takes all rows."""
    whole, train = total_steps(config.train), config.train
    if options.max_rows == 0 or method_of(options.method).needs_shadow:
        return whole
    batches = math.ceil(options.max_rows / train.per_client_batch_size)
    # Clients may take turns of several steps, or be drawn by lot for a round.
    asked = [client for client in (options.victim, options.colluder) if client is not None]
    least = {client: batches for client in asked if client < train.clients}
    taken: Counter[int] = Counter()
    for step in range(options.first_step, whole):
        taken.update(clients_of_step(train, step))
        if all(taken[client] >= least[client] for client in least):
            return step + 1
    return whole


def _check_clients(config: Config, options: AttackConfig) -> None:
    clients, needs = config.train.clients, method_of(options.method).needs_shadow
    named = {"victim": options.victim, "colluder": options.colluder if needs else None}
    for name, client in named.items():
        if client is not None and client >= clients:
            raise ConfigError(f"--attack.{name} {client}: the run has clients 0 to {clients - 1} (--train.clients)")


def _make_run(command: Sequence[str]) -> None:
    """In a process group of its own, which an interrupt of this one ends."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    if code:
        raise RunFailed(f"the run that was to be attacked ended with exit code {code} (see above)", code)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
        try:
            process.wait(_GRACE_S)
            return
        except subprocess.TimeoutExpired:
            continue


class RunFailed(HpcError):
    """The run before the attack failed; its exit code is handed on."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if code in (2, 75) else 1
