"""One role of a run whose flags come in the environment, so that one nursery can fork the roles of many runs.

With HPC_TEST_DIES_AT it kills itself, really, at an exact place that no other process could hit.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS, DIES_AT = "HPC_TEST_ARGUMENTS", "HPC_TEST_DIES_AT"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, step: int) -> None:
    """`sending`: with a part of the frame on the wire; `computing`: in the head's forward pass."""
    from hpc.acts import HeadForward
    from hpc.client_step import ClientStepRun
    from hpc.link.outgoing import Outgoing

    carry_out, send = ClientStepRun.carry_out, Outgoing.send
    state = {"sends": False}

    def watched(self: Any, act: Any) -> None:
        if self._order.step == step:
            state["sends"] = place == "sending"
            if place == "computing" and isinstance(act, HeadForward):
                die()
        carry_out(self, act)

    def torn(self: Any, plain_header: Any, payload: memoryview) -> None:
        if state["sends"] and len(payload):
            transport_send, count = self._transport.send, 0

            def first_only(buffer: Any) -> Any:
                nonlocal count
                count += 1
                if count > 1:
                    die()
                pending = transport_send(buffer)
                pending.wait(5.0)  # it has left
                return pending

            self._transport.send = first_only
            send(self, plain_header, payload)
            die()
        send(self, plain_header, payload)

    ClientStepRun.carry_out = watched  # type: ignore[method-assign]
    Outgoing.send = torn  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]
    import train

    from hpc.cli import run_main

    if DIES_AT in os.environ:
        place, _, step = os.environ[DIES_AT].partition(":")
        arm(place, int(step))
    sys.argv = ["train.py", *json.loads(os.environ[ARGUMENTS])]
    run_main(train.main)
