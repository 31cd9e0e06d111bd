"""A run's progress: one bar on a terminal, a few plain lines elsewhere. Reads the roles' event files."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from hpc.report.cells import size
from hpc.report.events import Event, Tail, role_files

QUIET_SECONDS = 10.0  # least time between two plain lines
LONG_SILENCE_SECONDS = 60.0  # a plain line after so long even if little was done
KEPT_STEPS = 100  # how far roles may run apart in their files
PLAIN_SHARE = 0.1  # of the steps, otherwise, between two plain lines


class Progress:
    """Shows step, loss, step time and bytes per step; call `poll` after a step, or every second or so."""

    def __init__(
        self,
        folder: str | Path,
        *,
        total_steps: int,
        clients_per_step: int,
        stream: TextIO | None = None,
        terminal: bool | None = None,
        form: Callable[[str], str] = str,
    ) -> None:
        """`clients_per_step`: how many clients have a loss in a step, e.g. 1 in `serial`. `stream`: stderr by default.

        `terminal`: whether the stream can redraw a line; by default the stream is asked. `form`: of a plain line.
        """
        self._folder, self._form = Path(folder), form
        self._total = total_steps
        self._clients = clients_per_step
        self._stream = stream or sys.stderr
        self._tails: dict[str, Tail] = {}
        self._losses: dict[int, dict[str, tuple[float, int]]] = defaultdict(dict)
        self._bytes: dict[int, dict[str, int]] = defaultdict(dict)
        self._step = 0
        self._seconds: float | None = None
        self._lost: set[int] = set()
        self._stopped_early = False
        self._said_step, self._said_at = 0, -math.inf
        self._bar: tqdm[None] | None = None
        if self._stream.isatty() if terminal is None else terminal:
            self._bar = tqdm(total=total_steps, file=self._stream, unit="step", dynamic_ncols=True, mininterval=0)

    def poll(self) -> None:
        """Take in what the roles wrote since the last call and show it if there is something new."""
        for role, path in role_files(self._folder).items():
            if role != "baseline":
                for event in self._tails.setdefault(role, Tail(path))():
                    self._take(role, event)
        self._show()

    def close(self) -> None:
        """Show the end."""
        self.poll()
        if self._bar is not None:
            self._bar.close()
        elif self._step > self._said_step:
            self._say()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _take(self, role: str, event: Event) -> None:
        if event["event"] == "started" and not role.startswith("client-"):
            self._begin(event["step"])
        if event["event"] == "client_lost":
            self._lost.add(event["client_id"])
        if event["event"] == "client_returned":
            self._lost.discard(event["client_id"])
        if event["event"] == "early_stop":
            self._stopped_early = True
        if event["event"] != "step":
            return
        step = event["step"]
        if "label_tokens" in event:
            self._losses[step][role] = (event["loss_sum"], event["label_tokens"])
        if "bytes" in event:
            self._bytes[step][role] = event["bytes"]["wire"]
        if not role.startswith("client-"):
            self._step, self._seconds = max(self._step, step), event["seconds"]["total"]
        for kept in (self._losses, self._bytes):
            kept.pop(step - KEPT_STEPS, None)

    def _begin(self, step: int) -> None:
        """Go (back) to where this attempt begins; the bar's speed is counted from here."""
        self._step = self._said_step = step
        self._lost, self._stopped_early = set(), False
        if self._bar is not None:
            self._bar.initial = self._bar.n = step
            self._bar.unpause()

    def _loss(self) -> float | None:
        """Of the newest step whose losses are all here: clients may write theirs a moment after the trunk its own."""
        for step in range(self._step, max(self._step - 2, 0), -1):
            parts = self._losses.get(step, {})
            tokens = sum(count for _, count in parts.values())
            # How many of a step's clients are among the lost is not known here, as others may take part in each step.
            all_here = len(parts) >= self._clients - len(self._lost)
            if tokens and (all_here or not any(role.startswith("client-") for role in parts)):
                return sum(loss for loss, _ in parts.values()) / tokens
        return None

    def _figures(self) -> str:
        """E.g. `loss 0.6931, 0.412 s, 2.25 MiB`; what is not known is left out."""
        loss, sent = self._loss(), sum(self._bytes.get(self._step, {}).values())
        known = [
            "" if loss is None else f"loss {loss:.4f}",
            "" if self._seconds is None else f"{self._seconds:.3f} s/step",
            f"{size(sent)}/step" if sent else "",
            "stopped early" if self._stopped_early else "",
        ]
        return ", ".join(part for part in known if part)

    def _show(self) -> None:
        if self._bar is not None:
            if self._step != self._bar.n or self._figures() not in str(self._bar.postfix):
                self._bar.n = self._step
                self._bar.set_postfix_str(self._figures(), refresh=True)
        elif self._step > self._said_step and self._due():
            self._say()

    def _due(self) -> bool:
        """Whether a plain line is worth its place in a log file."""
        silence = time.monotonic() - self._said_at
        enough = self._step - self._said_step >= PLAIN_SHARE * self._total or silence >= LONG_SILENCE_SECONDS
        return silence >= QUIET_SECONDS and (enough or self._said_step == 0)

    def _say(self) -> None:
        print(self._form(f"step {self._step}/{self._total}: {self._figures()}"), file=self._stream, flush=True)
        self._said_step, self._said_at = self._step, time.monotonic()
