"""The launcher's end of `hpc.nursery`: start it, ask it for roles, hear how they ended. Imports no torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Protocol

from hpc.config import Config
from hpc.nursery import ROOM

SWITCH = "HPC_NURSERY"  # 0: every role is started, and imports everything, by itself
GPUS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
ROOM_BYTES = 1024
GRACE_S = 3.0


class Process(Protocol):
    """What the launcher needs of a process: `subprocess.Popen` has it, and so has a forked role."""

    @property
    def pid(self) -> int | None: ...

    @property
    def returncode(self) -> int | None: ...

    def poll(self) -> int | None: ...


def roles_can_be_forked(config: Config, environ: Mapping[str, str]) -> bool:
    """Not where a role may use a GPU: CUDA cannot be handed on by a fork, so nothing is risked near one."""
    gpu = config.run.device == "cuda" or (config.run.device == "auto" and any(glob(pattern) for pattern in GPUS))
    return environ.get(SWITCH) != "0" and sys.platform == "linux" and not gpu


class Nursery:
    """A running nursery for roles that run `script` with `arguments`."""

    def __init__(
        self,
        command: list[str],
        script: Path,
        arguments: list[str],
        environ: Mapping[str, str],
        *,
        quantization: str = "none",
        hand_down: tuple[int, ...] = (),
    ) -> None:
        """`command` starts `hpc.nursery.main`. `environ`: the roles' common part; `hand_down`: open files for them."""
        self._line, far = socket.socketpair()
        with far:
            own = [str(far.fileno()), ",".join(map(str, hand_down)), quantization]
            self.process = subprocess.Popen(
                [*command, *own, str(script), *arguments],
                env={**environ, ROOM: " " * ROOM_BYTES},
                pass_fds=(far.fileno(), *hand_down),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._unread = b""
        self._roles: list[Nursling] = []
        self.death: str | None = None

    def start(self, own: Mapping[str, str], hand_down: tuple[int, ...] = ()) -> Nursling:
        """Ask for a role with `own` variables besides the common ones; it may start some seconds later."""
        role = Nursling(self)
        request = {"number": len(self._roles), "environ": dict(own), "keep": list(hand_down)}
        self._roles.append(role)
        try:
            self._line.sendall(json.dumps(request).encode() + b"\n")
        except ConnectionError:
            self.listen()
        return role

    def listen(self) -> None:
        """Take in what the nursery has told so far, its own death included."""
        if self.death is not None:
            return
        try:
            while heard := self._line.recv(1 << 16, socket.MSG_DONTWAIT):
                *told, self._unread = (self._unread + heard).split(b"\n")
                for each in map(json.loads, told):
                    self._roles[each["number"]].hear(each)
        except BlockingIOError:
            return
        except ConnectionError:
            pass
        self._mourn()

    def _mourn(self) -> None:
        """The kernel kills the roles of a nursery that dies; nobody can tell any more how they ended."""
        status = self.process.wait(GRACE_S)
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
        self.death = f"the process that starts the roles {how}; HPC_NURSERY=0 lets each role start by itself"
        for role in self._roles:
            if role.returncode is None:
                role.hear({"code": -signal.SIGKILL})

    def close(self) -> None:
        """End it, and with it whatever role is left. Closing it again changes nothing."""
        if self._line.fileno() < 0:
            return
        self.listen()
        self._line.close()
        try:
            importing = all(role.pid is None for role in self._roles)  # and hears nothing meanwhile
            self.process.wait(0 if importing else GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Nursling:
    """A role that the nursery forks; `pid` is None until it has."""

    def __init__(self, nursery: Nursery) -> None:
        self._nursery = nursery
        self.pid: int | None = None
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or minus the signal that ended it; None while it runs or is yet to be forked."""
        if self.returncode is None:
            self._nursery.listen()
        return self.returncode

    def hear(self, told: Mapping[str, int]) -> None:
        """What the nursery says of this role."""
        self.pid = told.get("pid", self.pid)
        self.returncode = told.get("code")
