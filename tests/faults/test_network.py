"""The cable between two hosts: out for five seconds in mid-run, and cut for good in the middle of a frame."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.record import record
from tests.netns import needs_namespaces, two_hosts
from tests.runs import BIN, JOIN, STEPS, TINY, TRAIN, Finished, Started

pytestmark = [pytest.mark.timeout(240), needs_namespaces]
PYTHON, PORT = str(BIN / "python"), "29500"
MEET = {"MASTER_ADDR": "host-a", "MASTER_PORT": PORT}
OUTAGE_S, PATIENCE_S = 5.0, 12.0


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.02)


def test_a_link_that_is_down_for_5_s(one_machine_run: Finished, run_keys: Path, tmp_path: Path) -> None:
    """Client 1 has joined from the other host; TCP sends again what was under way, and no byte is lost."""
    folder = tmp_path / "o"
    common = [*TINY, *STEPS, "--link.keys_dir", str(run_keys), "--link.timeout_s", "60"]
    trunk_side = [*common, "--run.output_dir", str(folder), "--run.outside_clients", "1"]
    with two_hosts() as hosts, Started() as runs:
        hosts.slow_down(mbit=8)  # a step takes most of a second, so that the outage falls into one
        for rank, role in enumerate(("trunk", "client-0")):
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", **MEET}
            runs.start(role, hosts.command("a", PYTHON, TRAIN, *trunk_side), **ranks)
        where = ["--host", "host-a", "--port", PORT, "--client_id", "1"]
        runs.start("client-1", hosts.command("b", PYTHON, JOIN, *common, *where))
        events = folder / "roles" / "trunk-0" / "metrics.jsonl"
        wait_until(lambda: events.exists() and '"step"' in events.read_text(), "the first step")
        before = hosts.bytes_sent("b")
        wait_until(lambda: hosts.bytes_sent("b") > before + 50_000, "bytes of the next step")
        hosts.cut()
        time.sleep(OUTAGE_S)
        assert all(process.poll() is None for process in runs.all.values())
        hosts.mend()
        for name, (code, err) in runs.wait(90).items():
            assert code == 0, (name, err)
        assert not hosts.processes()
    assert json.loads((folder / "summary.json").read_text())["losses"] == one_machine_run.summary["losses"]
    record(
        fault=f"a client's network is down for {OUTAGE_S:g} s",
        goes_on="the whole run, with the same losses, once the network is back",
        lost="nothing",
        message="none",
        noticed_s=None,
    )


def test_a_link_cut_in_the_middle_of_a_frame(run_keys: Path, tmp_path: Path) -> None:
    common = [*TINY, "--train.clients", "1", "--train.per_client_batch_size", "16", "--link.keys_dir", str(run_keys)]
    common += ["--link.timeout_s", f"{PATIENCE_S:g}", "--run.output_dir", str(tmp_path / "o")]
    with two_hosts() as hosts, Started() as runs:
        hosts.slow_down(mbit=2)  # a frame of smashed activations takes seconds
        for rank, (role, host) in enumerate({"trunk": "a", "client": "b"}.items()):
            ranks = {"RANK": str(rank), "WORLD_SIZE": "2", **MEET}
            runs.start(role, hosts.command(host, PYTHON, TRAIN, *common), **ranks)
        wait_until(lambda: hosts.bytes_sent("b") > 200_000, "bytes of a frame")
        hosts.cut()
        cut_at = time.monotonic()
        ended = runs.wait(PATIENCE_S + 30)
        assert not hosts.processes()
    noticed = {role: runs.ended_at[role] - cut_at for role in ended}
    for role, peer in {"trunk": "client 0", "client": "trunk rank 0"}.items():
        code, err = ended[role]
        assert code == 1, (role, err)
        *_, line = err.splitlines()
        assert "run ended: PeerLost:" in line, (role, err)
        assert peer in line, (role, line)
        assert "Traceback" not in err
        assert noticed[role] < PATIENCE_S + 8, (role, noticed)
    for role, (_, err) in ended.items():
        record(
            fault=f"the network is cut in the middle of a frame: the {role} (link.timeout_s {PATIENCE_S:g})",
            goes_on="nothing: the run's only link is gone",
            lost="the steps since the last checkpoint",
            message=f"{role}: {err.strip().rpartition('run ended: ')[2]}",
            noticed_s=noticed[role],
        )
