"""The same federation over two hosts (network namespaces), however it is started there: the losses of one machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.netns import Hosts, needs_namespaces, two_hosts
from tests.runs import BIN, JOIN, LOCAL, STEPS, TINY, TRAIN, Finished, Started

pytestmark = [pytest.mark.timeout(240), needs_namespaces]
PORT = "29500"


def flags(folder: Path, keys: Path) -> list[str]:
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(keys), "--link.timeout_s", "60"]
    return [*TINY, *STEPS, *own]


def start_torchrun(hosts: Hosts, runs: Started, *arguments: str) -> None:
    """Two processes on one host, one on the other."""
    for number, host in enumerate("ab"):
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"host-a:{PORT}", "--rdzv-id", hosts.tag]
        nodes = ["--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", str(2 - number)]
        command = [str(BIN / "torchrun"), *nodes, *meet, LOCAL, *arguments]
        runs.start(f"host-{host}", hosts.command(host, *command))


def start_by_hand(hosts: Hosts, runs: Started, places: dict[str, str], *arguments: str, **variables: str) -> None:
    """`places`: role → host, in the order of ranks."""
    for rank, (role, host) in enumerate(places.items()):
        own = {"RANK": str(rank), "WORLD_SIZE": str(len(places)), **variables}
        runs.start(role, hosts.command(host, str(BIN / "python"), TRAIN, *arguments), **own)


def assert_equal(runs: Started, folder: Path, expected: Finished) -> None:
    for name, (code, err) in runs.wait(100).items():
        assert code == 0, (name, err[-3000:])
    assert json.loads((folder / "summary.json").read_text())["losses"] == expected.summary["losses"]


@pytest.mark.long
def test_torchrun_over_two_hosts(one_machine_run: Finished, run_keys: Path, tmp_path: Path) -> None:
    with two_hosts() as hosts, Started() as runs:
        start_torchrun(hosts, runs, *flags(tmp_path / "o", run_keys))
        assert_equal(runs, tmp_path / "o", one_machine_run)


def test_torchrun_with_links_on_the_second_network_and_a_meeting_in_a_file(
    one_machine_run: Finished, run_keys: Path, tmp_path: Path
) -> None:
    """Two networks join the hosts; what is asked for carries the run, the other only torchrun's own few words."""
    shared = tmp_path / "shared folder"
    shared.mkdir()
    with two_hosts(cables=2) as hosts, Started() as runs:
        by_flag = ("--link.interface", hosts.device(1), "--link.rendezvous", str(shared))
        start_torchrun(hosts, runs, *flags(tmp_path / "o", run_keys), *by_flag)
        assert_equal(runs, tmp_path / "o", one_machine_run)
        payload = 4 * one_machine_run.summary["link_bytes_per_step"]["payload"] / 2  # of one client, both ways
        assert sum(hosts.bytes_sent(host, 1) for host in "ab") > 0.9 * payload
        assert sum(hosts.bytes_sent(host, 0) for host in "ab") < 0.1 * payload
    assert not list(shared.iterdir())


@pytest.mark.long
def test_roles_started_by_hand_on_two_hosts(one_machine_run: Finished, run_keys: Path, tmp_path: Path) -> None:
    with two_hosts() as hosts, Started() as runs:
        places = {"trunk": "a", "client-0": "b", "client-1": "b"}
        meet = {"MASTER_ADDR": "host-a", "MASTER_PORT": PORT}
        start_by_hand(hosts, runs, places, *flags(tmp_path / "o", run_keys), **meet)
        assert_equal(runs, tmp_path / "o", one_machine_run)


@pytest.mark.long
def test_a_stranger_cannot_join(run_keys: Path, tmp_path: Path) -> None:
    """Its key is not the one that the trunk knows; the joiner is told, and the run ends in one line that names it."""
    from hpc.link.identity import ensure_local

    ensure_local(tmp_path / "strangers", 2)
    (tmp_path / "strangers" / "server.pem").write_bytes((run_keys / "server.pem").read_bytes())
    with two_hosts() as hosts, Started() as runs:
        common, meet = flags(tmp_path / "o", run_keys), {"MASTER_ADDR": "host-a", "MASTER_PORT": PORT}
        places = {"trunk": "a", "client-0": "a"}
        start_by_hand(hosts, runs, places, *common, "--run.outside_clients", "1", **meet)
        where = ("--host", "host-a", "--port", PORT, "--client_id", "1")
        own = (*flags(tmp_path / "j", tmp_path / "strangers"), *where)
        runs.start("client-1", hosts.command("b", str(BIN / "python"), JOIN, *own))
        for name, (code, err) in runs.wait(100).items():
            assert code == (1 if name == "client-0" else 2), (name, err)  # it only hears of it
            assert "client-1" in err, (name, err)
            assert "not authorised" in err, (name, err)
            assert "Traceback" not in err
