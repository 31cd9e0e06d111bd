"""Roles forked from one process behave as if each had been started by itself. No role here imports torch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hpc import nurslings
from hpc.config import Config, RunConfig
from hpc.nurslings import Nursery, Nursling, roles_can_be_forked

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [
    sys.executable,
    "-c",
    "import sys; from hpc.nursery import main; sys.exit(main(sys.argv[1:], {imports}))",
]
ROLE = """
import json, os, signal, sys, time
from pathlib import Path
me = Path(os.environ["FOLDER"]) / os.environ["RANK"]
def still_open(number):
    try: os.fstat(number)
    except OSError: return False
    return True
import numpy
facts = dict(pid=os.getpid(), group=os.getpgid(0), session=os.getsid(0), argv=sys.argv, name=__name__, path=sys.path[0])
facts.update(environ=dict(os.environ), draw=float(numpy.random.random()), stdin=os.readlink("/proc/self/fd/0"))
facts.update(sockets=[n for n in map(int, os.listdir("/proc/self/fd")) if still_open(n)
                      and os.readlink(f"/proc/self/fd/{n}").startswith("socket:")])
me.with_suffix(".draft").write_text(json.dumps(facts))
me.with_suffix(".draft").rename(me)
do = sys.argv[1]
if do == "wait": time.sleep(60)
if do == "kill": os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(do))
"""
DEADLINE_S = 20


@pytest.fixture
def nursery_of(tmp_path: Path) -> Iterator[Callable[..., Nursery]]:
    made: list[Nursery] = []

    def make(do: str, imports: str = "()", hand_down: tuple[int, ...] = ()) -> Nursery:
        script = tmp_path / "role.py"
        script.write_text(ROLE)
        command = [*COMMAND[:-1], COMMAND[-1].format(imports=imports)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path), "BOTH": "common"}
        environ.pop("OMP_NUM_THREADS")  # it would keep numpy from starting threads
        made.append(Nursery(command, script, [do], environ, hand_down=hand_down))
        return made[-1]

    try:
        yield make
    finally:
        for nursery in made:
            nursery.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def facts_of(tmp_path: Path, rank: int) -> dict[str, object]:
    until((tmp_path / str(rank)).exists)
    found: dict[str, object] = json.loads((tmp_path / str(rank)).read_text())
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_role_is_a_process_of_its_own(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    with socket.socket() as listener:
        nursery = nursery_of("7", hand_down=(listener.fileno(),))
        with_file = nursery.start({"RANK": "0", "BOTH": "own"}, (listener.fileno(),))
        without = nursery.start({"RANK": "1"})
        until(lambda: with_file.poll() is not None and without.poll() is not None)
        assert (with_file.returncode, without.returncode) == (7, 7)
        facts = [facts_of(tmp_path, rank) for rank in (0, 1)]
        assert facts[0]["sockets"] == [listener.fileno()]
        assert facts[1]["sockets"] == []
    for role, each in zip((with_file, without), facts, strict=True):
        assert each["pid"] == each["group"] == each["session"] == role.pid
        assert each["argv"] == [str(tmp_path / "role.py"), "7"]
        assert (each["name"], each["path"]) == ("__main__", str(tmp_path))
        assert each["stdin"] == os.devnull
    own, common = (each["environ"] for each in facts)
    assert isinstance(own, dict)
    assert isinstance(common, dict)
    assert (own["RANK"], own["BOTH"], common["RANK"], common["BOTH"]) == ("0", "own", "1", "common")
    assert "HPC_NURSERY_ROOM" not in own
    assert own.get("OPENBLAS_NUM_THREADS") == os.environ.get("OPENBLAS_NUM_THREADS")
    assert facts[0]["draw"] != facts[1]["draw"], "roles share a random state"


def test_a_role_ends_as_python_ends(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    """Threads are waited for, exit functions run, and what was printed is there; an exception is exit code 1."""
    nursery = nursery_of("0")
    (tmp_path / "role.py").write_text(
        "import atexit, os, sys, threading, time\nfrom concurrent.futures import ThreadPoolExecutor\n"
        "from pathlib import Path\nnote = Path(__file__).with_name('note' + os.environ['RANK'])\n"
        "if os.environ['RANK'] == '1': raise ValueError('oops')\n"
        "if os.environ['RANK'] == '2': sys.exit('some words')\n"
        "pool = ThreadPoolExecutor(1); pool.submit(print)\n"
        "atexit.register(lambda: note.write_text(note.read_text() + ' atexit'))\n"
        "def late(): time.sleep(0.3); note.write_text('thread')\n"
        "threading.Thread(target=late).start()\n"
    )
    roles = [nursery.start({"RANK": str(rank)}) for rank in range(3)]
    until(lambda: all(role.poll() is not None for role in roles))
    assert [role.returncode for role in roles] == [0, 1, 1]
    assert (tmp_path / "note0").read_text() == "thread atexit"


def test_ps_can_tell_the_roles_apart(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    role = nursery_of("wait").start({"RANK": "5"})
    facts_of(tmp_path, 5)
    until(lambda: role.poll() is None and role.pid is not None)
    shown = Path(f"/proc/{role.pid}/environ").read_bytes().split(b"\0")
    assert b"RANK=5" in shown
    assert b"BOTH=common" in shown


def test_a_killed_role_is_told_by_its_signal(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    nursery = nursery_of("wait")
    killed, other = nursery.start({"RANK": "0"}), nursery.start({"RANK": "1"})
    for rank in (0, 1):
        facts_of(tmp_path, rank)
    until(lambda: killed.poll() is None and killed.pid is not None)
    assert killed.pid is not None
    os.killpg(killed.pid, signal.SIGKILL)
    until(lambda: killed.poll() is not None)
    assert killed.returncode == -signal.SIGKILL
    assert other.poll() is None
    assert not Path(f"/proc/{killed.pid}").exists(), "a zombie is left"


def test_roles_end_with_the_nursery(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    nursery = nursery_of("wait")
    roles: list[Nursling] = [nursery.start({"RANK": str(rank)}) for rank in (0, 1)]
    pids = [facts_of(tmp_path, rank)["pid"] for rank in (0, 1)]
    nursery.process.kill()
    until(lambda: all(role.poll() is not None for role in roles))
    assert nursery.death is not None
    assert "killed by SIGKILL" in nursery.death
    assert "HPC_NURSERY=0" in nursery.death
    until(lambda: not any(is_alive(int(str(pid))) for pid in pids))


def test_closing_the_nursery_leaves_no_process(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    nursery = nursery_of("wait")
    nursery.start({"RANK": "0"})
    pid = int(str(facts_of(tmp_path, 0)["pid"]))
    nursery.close()
    assert nursery.process.returncode == 0
    assert not is_alive(pid)


def test_closing_does_not_wait_for_imports(nursery_of: Callable[..., Nursery], tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(30)\n")
    nursery = nursery_of("0", imports=f"(sys.path.insert(0, {str(tmp_path)!r}) or 'slow',)")
    role = nursery.start({"RANK": "0"})
    assert role.poll() is None
    began = time.monotonic()
    nursery.close()
    assert time.monotonic() - began < 2
    assert nursery.process.returncode == -signal.SIGKILL


def test_roles_end_with_the_launcher(tmp_path: Path) -> None:
    """The launcher is killed while a role runs."""
    (tmp_path / "role.py").write_text(ROLE)
    command = [*COMMAND[:-1], COMMAND[-1].format(imports="()")]
    launcher = (
        "import sys, time\nfrom pathlib import Path\nfrom hpc.nurslings import Nursery\nimport os\n"
        f"nursery = Nursery({command!r}, Path({str(tmp_path / 'role.py')!r}), ['wait'], os.environ)\n"
        "nursery.start({'RANK': '0'})\ntime.sleep(60)\n"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(tmp_path)}
    run = subprocess.Popen([sys.executable, "-c", launcher], env=environ, start_new_session=True)
    try:
        pid = int(str(facts_of(tmp_path, 0)["pid"]))
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    finally:
        run.kill()
        run.wait(DEADLINE_S)
    until(lambda: not is_alive(pid) and not is_alive(parent))


def test_a_nursery_that_cannot_import_says_so(
    nursery_of: Callable[..., Nursery], capfd: pytest.CaptureFixture[str]
) -> None:
    nursery = nursery_of("0", imports="('no_such_module_here',)")
    role = nursery.start({"RANK": "0"})
    until(lambda: role.poll() is not None)
    assert nursery.death is not None
    assert "exit code 1" in nursery.death
    assert "no_such_module_here" in capfd.readouterr().err


def test_a_process_with_threads_is_not_forked(
    nursery_of: Callable[..., Nursery], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
    )
    nursery = nursery_of("0", imports=f"(sys.path.insert(0, {str(tmp_path)!r}) or 'threaded',)")
    role = nursery.start({"RANK": "0"})
    until(lambda: role.poll() is not None)
    assert "1 threads run where roles are to be forked" in capfd.readouterr().err
    assert not (tmp_path / "0").exists()


def test_nothing_is_forked_near_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, no_device = tmp_path / "nvidia0", tmp_path / "none"
    device.touch()

    def on(kind: str) -> Config:
        return replace(Config(), run=RunConfig(device=kind))  # type: ignore[arg-type]

    monkeypatch.setattr(nurslings, "GPUS", (str(no_device),))
    assert roles_can_be_forked(on("auto"), {})
    assert roles_can_be_forked(on("cpu"), {})
    assert not roles_can_be_forked(on("cuda"), {})
    assert not roles_can_be_forked(on("auto"), {"HPC_NURSERY": "0"})
    monkeypatch.setattr(nurslings, "GPUS", (str(tmp_path / "nvidia[0-9]"),))
    assert not roles_can_be_forked(on("auto"), {})
    assert roles_can_be_forked(on("cpu"), {})
