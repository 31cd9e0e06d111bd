"""Roles that meet through a folder find the run that lives, never one that has ended, and leave nothing behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hpc.errors import ConfigError, PeerLost, TopologyError
from hpc.link.gloo import SERVER, connect_gloo
from hpc.link.meeting_file import Meeting, leave_meetings, meeting_name, open_store, require_folder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _leave() -> Iterator[None]:
    yield
    leave_meetings()


def abandoned(folder: Path) -> None:
    """What a run leaves behind that was killed."""
    program = (
        "import os, sys; from hpc.link.meeting_file import open_store;"
        "open_store(sys.argv[1], 'run', hosts=True, timeout_s=9).set('who', 'dead'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], cwd=ROOT, check=False, timeout=60)
    assert (folder / "meet-run").exists()


def test_two_processes_meet_and_link(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from hpc.link.meeting_file import open_store; from hpc.link.gloo import connect_gloo;"
        "store = open_store(sys.argv[1], 'run', hosts=False, timeout_s=30);"
        "link = connect_gloo(store, client_id=0, rank=1, timeout_s=30, peer='trunk', address='127.0.0.1');"
        "link.send(torch.arange(5, dtype=torch.uint8)).wait(30); link.recv(torch.empty(1, dtype=torch.uint8)).wait(30)"
    )
    client = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, start_new_session=True)
    try:
        store = open_store(str(tmp_path), "run", hosts=True, timeout_s=30)
        link = connect_gloo(store, client_id=0, rank=SERVER, timeout_s=30, peer="client 0", address="127.0.0.1")
        buffer = torch.empty(5, dtype=torch.uint8)
        link.recv(buffer).wait(30)
        assert buffer.tolist() == [0, 1, 2, 3, 4]
        link.send(buffer[:1].clone()).wait(30)
        assert client.wait(30) == 0
    finally:
        client.kill()
        client.wait()
    del link, store
    leave_meetings()
    assert not list(tmp_path.iterdir())


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    meeting = Meeting(str(tmp_path), "run")
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in (meeting.path, meeting.path.parent)}
    assert list(found.values()) == [0o600, 0o700]
    assert stat.S_IMODE((tmp_path / "meet-run").stat().st_mode) == 0o600


def test_a_store_has_what_a_run_needs_of_it(tmp_path: Path) -> None:
    store = dist.PrefixStore("p", open_store(str(tmp_path), "run", hosts=True, timeout_s=0.2))
    store.set("a", "1")
    assert (store.get("a"), store.add("n", 2), store.check(["a"]), store.check(["b"])) == (b"1", 2, True, False)
    with pytest.raises(RuntimeError, match=r"[Tt]imeout"):
        store.get("b")


def test_what_a_killed_run_left_is_not_taken_up(tmp_path: Path) -> None:
    abandoned(tmp_path)
    with pytest.raises(PeerLost, match=r"no run meets in .* as 'run' after 0.6 s; there are run: is trunk rank 0"):
        open_store(str(tmp_path), "run", hosts=False, timeout_s=0.6)


def test_a_requeued_run_replaces_what_the_killed_one_left(tmp_path: Path) -> None:
    """The client is there first and sees the old pointer; it takes up the new run's."""
    abandoned(tmp_path)
    said: list[bytes] = []
    client = threading.Thread(
        target=lambda: said.append(open_store(str(tmp_path), "run", hosts=False, timeout_s=20).get("who"))
    )
    client.start()
    open_store(str(tmp_path), "run", hosts=True, timeout_s=20).set("who", "alive")
    client.join(20)
    assert said == [b"alive"]
    assert len(list(tmp_path.iterdir())) == 2  # the pointer and one store


def test_a_role_that_comes_late_finds_the_run(tmp_path: Path) -> None:
    open_store(str(tmp_path), "run", hosts=True, timeout_s=5).set("k", "v")
    time.sleep(0.4)
    assert open_store(str(tmp_path), "run", hosts=False, timeout_s=5).get("k") == b"v"


def test_two_runs_at_a_time_have_their_own_names(tmp_path: Path) -> None:
    for name in ("port-1", "port-2"):
        open_store(str(tmp_path), name, hosts=True, timeout_s=5).set("who", name)
    for name in ("port-1", "port-2"):
        assert open_store(str(tmp_path), name, hosts=False, timeout_s=5).get("who") == name.encode()


def test_a_second_run_of_the_same_name_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run", hosts=True, timeout_s=5)
    with pytest.raises(TopologyError, match=r"another run meets in .* as 'run'; give this one a --link.port"):
        open_store(str(tmp_path), "run", hosts=True, timeout_s=5)
    store.set("k", "v")
    assert open_store(str(tmp_path), "run", hosts=False, timeout_s=5).get("k") == b"v"


def test_a_pointer_leads_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "store").write_text("kept")
    (tmp_path / "meet-run").write_text("other")
    open_store(str(tmp_path), "run", hosts=True, timeout_s=5)
    assert (tmp_path / "other" / "store").read_text() == "kept"


@pytest.mark.parametrize(
    ("port", "run_name", "environ", "name"),
    [
        (29500, "x", {"SLURM_JOB_ID": "7"}, "port-29500"),
        (0, "x", {"SLURM_JOB_ID": "7"}, "job-7"),
        (0, "x", {"SLURM_JOB_ID": "8", "SLURM_HET_JOB_ID": "7"}, "job-7"),
        (0, "first try+", {}, "first_try+"),
        (0, "", {}, "run"),
    ],
)
def test_roles_of_one_run_know_its_name(port: int, run_name: str, environ: dict[str, str], name: str) -> None:
    assert meeting_name(port, run_name, environ) == name


def test_a_folder_that_does_not_do_is_refused(tmp_path: Path) -> None:
    require_folder(str(tmp_path))
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for missing in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match=rf"--link.rendezvous {missing} is not a folder; make it"):
            require_folder(str(missing))
    with pytest.raises(ConfigError, match="cannot be written and locked"):
        require_folder("/proc/sys" if os.geteuid() == 0 else "/")
