"""Asked to stop by a signal: SIGUSR1 or SIGTERM, as a job scheduler sends before it takes a node away.

The trunk then ends the run at the next step's boundary, with a checkpoint; a client that was asked waits for the trunk
to do so. Whoever has not begun yet, is asked a second time, or is not done after `run.grace_s` seconds, ends at once.

A thread listens, since the main thread may stand in a library's wait, where no Python handler runs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

from hpc.errors import Paused

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
AGAIN_S = 2.0


class StopRequest:
    """Whether this role was asked to stop; false until then."""

    def __init__(self, *, again_s: float = AGAIN_S) -> None:
        """A signal within `again_s` of the first is the same request, come by another way."""
        self._asked = threading.Event()
        self._again = threading.Event()
        self._has_begun = False
        self._again_s, self._first_at = again_s, 0.0
        self.signal_name = ""

    def __call__(self) -> bool:
        return self._asked.is_set()

    def begin(self) -> None:
        """From now on there is something to save."""
        self._has_begun = True

    def ask(self, number: int) -> None:
        """A signal came."""
        now = time.monotonic()
        if not self._asked.is_set():
            self.signal_name, self._first_at = signal.Signals(number).name, now
            self._asked.set()
        elif now - self._first_at > self._again_s:
            self._again.set()

    def wait_for_end(self, grace_s: float) -> tuple[str, int]:
        """Returns when the role must end at once, with the reason and the exit code."""
        self._asked.wait()
        if not self._has_begun:
            return f"ended by {self.signal_name} before the run began; start it again", Paused.exit_code
        in_time = self._again.wait(grace_s)
        why = "asked again" if in_time else f"no checkpoint within --run.grace_s {grace_s:g} s"
        return f"ended by {self.signal_name}: {why}", 128 + signal.Signals[self.signal_name]


def paused_words(step: int, *, checkpoint: bool) -> str:
    """What a run says that was asked to stop after `step` steps."""
    if checkpoint:
        return f"paused after step {step}, with a checkpoint; go on with --run.resume_from_checkpoint latest"
    if step == 0:
        return "paused before the first step; start it again"
    return f"paused after step {step} without a checkpoint of it (see above); an older one may be there to resume from"


def listen(*, grace_s: float, end: Callable[[str, int], None]) -> StopRequest:
    """Take up the signals of this process from now on. `end` is called (in a thread) with the reason to end at once,
    and the exit code.

    Only in the main thread of a process, as Python sets signal handlers nowhere else.
    """
    request = StopRequest()
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    # The number of each signal is written by the C handler at once, whatever the main thread is doing.
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: None)

    def read() -> None:
        while True:
            for number in os.read(readable, 1):
                if number in SIGNALS:
                    request.ask(number)

    def watch() -> None:
        end(*request.wait_for_end(grace_s))

    for work in (read, watch):
        threading.Thread(target=work, name=f"signals-{work.__name__}", daemon=True).start()
    return request
