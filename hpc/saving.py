"""One role's hand in the checkpoints of its run: write, commit, and clear away what is no longer wanted.

Whoever coordinates (trunk rank 0, or the one process of `centralised`) commits and says which checkpoints are kept.
Each role then removes its own files from the others. So it makes no difference whether the roles share a folder: on a
shared one the last role to remove its file also removes the empty folder. The coordinator takes the manifest away
before it tells anyone, so a checkpoint that is half removed is one that was not finished. What fails here, a full disc
above all, is told and costs that checkpoint, never the run.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from hpc.agreement import lasting_agreement
from hpc.checkpoint import MANIFEST, Attempt, checkpoint_folder, commit, step_of, to_disk, write_role
from hpc.config import Config
from hpc.errors import ProtocolError
from hpc.report.events import EventLog
from hpc.resume import committed_steps, last_commit

COORDINATORS = ("trunk-0", "centralised")

_log = logging.getLogger("hpc")


class Saver:
    """Writes the files of `role`, in the name of one attempt of the run."""

    def __init__(self, *, config: Config, folder: Path, role: str, attempt: Attempt, log: EventLog) -> None:
        self._config, self._folder, self._role, self._attempt, self._events = config, folder, role, attempt, log
        self._coordinates = role in COORDINATORS
        self._written = -1  # the step of the last file that this role wrote

    def write(self, step: int, name: str, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, float]) -> bool:
        """Write this role's file `name`, unless it has just done so; False, after a warning, if that failed."""
        if step == self._written:
            return True
        try:
            if self._coordinates:  # an earlier attempt's checkpoint at this step ends as soon as a file of it is gone
                (checkpoint_folder(self._folder, step) / MANIFEST).unlink(missing_ok=True)
            write_role(self._folder, step, name, tensors, facts, attempt=self._attempt.name)
        except OSError as error:
            self.fail(step, str(error))
            return False
        self._written = step
        return True

    def fail(self, step: int, why: str) -> None:
        """Say that there will be no checkpoint at this step, and why."""
        _log.warning("no checkpoint at step %d: %s; the run goes on, and its older checkpoints stay", step, why)
        self._events.note("checkpoint_failed", step=step, why=why)

    def commit(self, step: int, clients: Sequence[int] | None = None) -> list[int]:
        """Make the checkpoint exist, when every role has written; the steps that are kept from now on, this one last.

        `clients`: those who have written, None for all.

        Empty, after a warning, if that failed. The manifests of those that are not kept are gone on return.
        """
        try:
            agreed, after = lasting_agreement(self._config), last_commit(self._folder)
            commit(self._folder, step, agreed, attempt=self._attempt.name, clients=clients, after=after)
        except OSError as error:
            self.fail(step, str(error))
            return []
        committed = [*(old for old in committed_steps(self._folder) if old != step), step]  # whatever the clocks say
        kept = kept_steps(committed, self._config.train.save_total_limit)
        for old in committed:
            if old not in kept:
                with self._warning(old):
                    (checkpoint_folder(self._folder, old) / MANIFEST).unlink()
                    to_disk(checkpoint_folder(self._folder, old))
        return kept

    def finish(self, step: int, kept: Sequence[int]) -> None:
        """Every role is done with this step: remove this role's files from checkpoints that are not kept.

        That includes the ones that an earlier attempt left half-written before this step. With an empty `kept` the
        checkpoint was not committed: only this role's file of it goes.
        """
        if step in kept:
            _log.info("checkpoint written after step %d", step)
        if step not in kept:
            self._written = -1
        for folder in self._folder.glob("checkpoint-*"):
            unwanted = folder.name not in {f"checkpoint-{each}" for each in kept}
            if (step_of(folder) == step and not kept) or (0 <= step_of(folder) < step and kept and unwanted):
                self._remove_own(folder)

    def _remove_own(self, folder: Path) -> None:
        names = ("trunk*.safetensors", ".*") if self._coordinates else (".*",)  # drafts of roles that were killed
        with self._warning(step_of(folder)):
            if self._coordinates and (folder / MANIFEST).exists():
                return  # it could not be taken away, so the checkpoint stays whole
            for path in {folder / f"{self._role}.safetensors", *(path for name in names for path in folder.glob(name))}:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: another role's files are still there; or it was the last
                folder.rmdir()

    @contextlib.contextmanager
    def _warning(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("%s cannot remove its part of checkpoint-%d: %s", self._role, step, error)


def kept_steps(committed: Sequence[int], limit: int) -> list[int]:
    """Of checkpoints in the order of their commits: the last `limit`, 0 for all. So never without the newest."""
    return list(committed[-limit:] if limit else committed)


def obstacle(*, lost: int, unwritten: Mapping[int, int], ranks: int, spared: bool = False) -> str | None:
    """Why trunk rank 0 does not commit, or None.

    `lost`: clients of all ranks that are gone; `spared`: others have what they had; `unwritten`: client → whether it
    could not write; `ranks`: trunk ranks other than this that could not.
    """
    if lost and not spared:  # nobody else could give what it had
        return "a client is lost, and its parts with it"
    failed = [f"client-{client}" for client, failed in sorted(unwritten.items()) if failed]
    failed += ["another trunk rank"] if ranks else []
    return f"{', '.join(failed)} could not write (see there for the reason)" if failed else None


def to_payload(kept: Sequence[int]) -> torch.Tensor:
    """What the trunk tells its clients after a save: the steps of the checkpoints that are kept; 0 if none was made."""
    return torch.tensor(kept or [0], dtype=torch.int64)


def from_payload(payload: torch.Tensor) -> list[int]:
    """The inverse of `to_payload`. Raises `ProtocolError`."""
    if payload.dim() != 1 or payload.dtype != torch.int64 or not len(payload):
        raise ProtocolError(f"the trunk sent {tuple(payload.shape)}, {payload.dtype} where kept checkpoints were due")
    return [step for step in payload.tolist() if step]
