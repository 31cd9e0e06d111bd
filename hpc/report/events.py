"""Events of a run: one JSON object a line, each role in its own file.

`<run folder>/roles/<role>/metrics.jsonl`, with roles named `trunk-0`, `client-1`, `baseline`, `centralised`. A client
writes its loss into its own file and nowhere else: no loss crosses a link. Whoever reports reads the files where the
folder is shared, and says "not known" where it is not.

Steps count from 1; step 0 stands for "before training". All durations are seconds of wall time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TextIO

FILE_NAME = "metrics.jsonl"
CLIENT_SECONDS = ("head", "tail", "seal", "open", "wire", "wait", "total")
TRUNK_SECONDS = ("trunk", "seal", "open", "wire", "wait", "total")
_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

Event = dict[str, Any]

_log = logging.getLogger("hpc")


@dataclass(kw_only=True, frozen=True)
class Started:
    """A role begins behind `step` (0: from scratch). What an earlier attempt wrote beyond it no longer counts."""

    name: ClassVar[str] = "started"
    step: int = 0


@dataclass(kw_only=True, frozen=True)
class ClientStep:
    """What one client did in one step."""

    name: ClassVar[str] = "step"
    step: int
    loss_sum: float
    """Sum of the loss over this client's label tokens (nats)."""
    label_tokens: int
    tokens: int
    """Tokens of the batch, prompt and answer, padding not counted."""
    seconds: Mapping[str, float]
    """Keys: CLIENT_SECONDS. `total` is the whole step without evaluation and checkpoints."""


@dataclass(kw_only=True, frozen=True)
class TrunkStep:
    """What one trunk rank did in one step."""

    name: ClassVar[str] = "step"
    step: int
    seconds: Mapping[str, float]
    """Keys: TRUNK_SECONDS. `total` is the whole step without evaluation and checkpoints."""
    bytes: Mapping[str, int]
    """`payload` (tensors) and `wire` (with headers and tags) over all its links, both directions; where the server
    has a cache also `cached`, the payload that it made unnecessary to send."""
    learning_rate: float
    grad_norm: float
    """Norm over all three parts before clipping."""
    skipped: bool = False
    """The gradient was not finite, so nobody stepped."""


@dataclass(kw_only=True, frozen=True)
class WholeStep:
    """A step of the uncut model: the role `centralised`, or `baseline` beside a split run."""

    name: ClassVar[str] = "step"
    step: int
    loss_sum: float
    label_tokens: int
    tokens: int
    seconds: Mapping[str, float]
    """Key: `total`."""
    learning_rate: float | None = None
    grad_norm: float | None = None
    skipped: bool = False


@dataclass(kw_only=True, frozen=True)
class Evaluation:
    """Held-out examples of one client, after `step` steps."""

    name: ClassVar[str] = "eval"
    step: int
    correct: int | None
    """Examples of which the likeliest choice is right; none: texts to generate, which have no choices."""
    total: int
    client_id: int | None = None
    """Needed only from the role `centralised`; a client's role says who it is."""
    loss_sum: float = math.nan
    """Loss of the right answers (nats), summed over their label tokens."""
    label_tokens: int = 0
    """Of the right answers; 0: the loss is not known, as in files of before it was measured."""
    matched: int | None = None
    """Decoded answers that are the right one, token for token; none: nothing was decoded."""


@dataclass(kw_only=True, frozen=True)
class Ended:
    """The last word of a role."""

    name: ClassVar[str] = "summary"
    peak_rss_mib: float
    parameters: Mapping[str, Mapping[str, int]]
    """Part (`head`, `trunk`, `tail`, `model`) → `owned` and `trainable`, numbers of values."""
    keys_read: int
    """Tensors read from the model's files."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    transport: str | None = None
    """What `link.transport=auto` came to."""


AnyEvent = Started | ClientStep | TrunkStep | WholeStep | Evaluation | Ended


def encode(value: Any) -> Any:
    """`value` fit for JSON: not-a-number and infinities, which JSON lacks, become "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value


class EventLog:
    """Appends events to a role's file; every line is flushed, so a crash leaves whole lines."""

    def __init__(self, path: str | Path, *, role: str | None = None) -> None:
        """`role`: by default the name of the file's folder. Nothing is created before the first event."""
        self.path = Path(path)
        self.role = role or self.path.parent.name
        self._file: TextIO | None = None
        self._warned = False

    def write(self, event: AnyEvent) -> None:
        self.note(event.name, **asdict(event))

    def note(self, name: str, **fields: Any) -> None:
        """An event without a class of its own. The report knows these, from trunk ranks:

        `nonfinite` (step, client_id or -1, what): "activations", "loss" or "gradient" for which a step was left out;
        `client_lost` (step, client_id, why); `client_returned` (step, client_id): it takes part from that step on;
        `client_refused` (client_id, why): who came under this name was not let in; `early_stop` (step): the run's last;
        `average` (step, seconds): parameters were averaged after `step`;
        `checkpoint_failed` (step, why): from any role, there is no checkpoint after `step`;
        `privacy` (step, and what `Shield.figures` says): from clients with noise, at their start and at their end.
        """
        line = {"event": name, "time": time.time(), "role": self.role, **fields}
        try:
            self._file = self._file or self._open()
            self._file.write(json.dumps(encode(line), allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:  # a full disc costs events, not the run
            if not self._warned:
                _log.warning("events of %s are lost: %s cannot be written (%s)", self.role, self.path, error)
            self._warned = True
            with contextlib.suppress(OSError):
                self.close()
            self._file = None  # opened anew, it loses the line that was cut

    def _open(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(self.path)
        return self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _drop_cut_line(path: Path) -> None:
    """A process that was killed may have left half a line; without this the next event would be glued to it."""
    if not path.exists():
        return
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)


class Tail:
    """Whole events that were added to a file since the last call; nothing while the file does not exist."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offset = 0

    def __call__(self) -> list[Event]:
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [decode(json.loads(line)) for line in whole.splitlines() if line.strip()]


def read_events(path: str | Path) -> list[Event]:
    """All whole events of a file, in the order written; a cut last line is left out."""
    return Tail(path)()


def current_attempt(events: Iterable[Event]) -> list[Event]:
    """The events that count: what a `started` event supersedes is gone, and of a repeated step the last one stays."""
    kept: dict[tuple[Any, ...], Event] = {}
    for number, event in enumerate(events):
        if event["event"] == "started":
            kept = {key: old for key, old in kept.items() if _outlives_restart(old, event["step"])}
        repeated = event["event"] in ("step", "eval")
        key = (event["event"], event["step"], event.get("client_id")) if repeated else (number,)
        kept.pop(key, None)
        kept[key] = event
    return list(kept.values())


def _outlives_restart(event: Event, begin: int) -> bool:
    """Whether `event` still counts once its role begins anew behind step `begin`."""
    # Wherever a run was stopped early: if it begins anew, it did go on, or stops again and says so.
    return begin > 0 and event["event"] != "early_stop" and event.get("step", begin + 1) <= begin


def role_path(folder: str | Path, role: str) -> Path:
    """Where `role` of the run in `folder` writes its events."""
    return Path(folder) / "roles" / role / FILE_NAME


def role_order(role: str) -> tuple[int, str, int]:
    """Sorting key: trunk ranks, clients, the rest; by number, so that client-10 follows client-9."""
    match = re.fullmatch(r"(.*?)-(\d+)", role)
    kind, number = (match[1], int(match[2])) if match else (role, 0)
    return ({"trunk": 0, "client": 1}.get(kind, 2), kind, number)


def role_files(folder: str | Path) -> dict[str, Path]:
    """Role → its event file, for the roles whose files are in `folder`, in reporting order."""
    paths = (Path(folder) / "roles").glob(f"*/{FILE_NAME}")
    found = {path.parent.name: path for path in paths if path.is_file()}
    return {role: found[role] for role in sorted(found, key=role_order)}
