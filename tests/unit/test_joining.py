"""A client from outside: its place in the run, and each mistake told in one line before any work."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from hpc.config import Config, LinkConfig, RunConfig, TrainConfig, TrunkConfig
from hpc.errors import ConfigError, PeerLost, TopologyError
from hpc.joining import place_from_outside, reachable_name, wait_for_store
from hpc.topology import check_world
from tests.runs import ROOT, TINY, run_command

CONFIG = Config(train=TrainConfig(clients=3), trunk=TrunkConfig(ranks=2))
JOIN = str(ROOT / "launch" / "join.py")


def test_its_place_is_that_of_its_rank() -> None:
    place = place_from_outside(CONFIG, client_id=1, host="127.0.0.1", port=29500)
    assert (place.name, place.world.global_rank, place.world.world_size) == ("client-1", 3, 5)
    assert (place.world.master_addr, place.world.master_port) == ("127.0.0.1", 29500)


def test_a_shared_folder_needs_no_host() -> None:
    config = Config(link=LinkConfig(rendezvous="/shared"))
    assert place_from_outside(config, client_id=0, host=None, port=None).name == "client-0"


@pytest.mark.parametrize(
    ("config", "client_id", "host", "port", "words"),
    [
        (CONFIG, None, "127.0.0.1", 1, "--client_id is missing; say which of the clients 0 to 2"),
        (CONFIG, 3, "127.0.0.1", 1, "--client_id 3: --train.clients 3 makes them 0 to 2"),
        (CONFIG, -1, "127.0.0.1", 1, "--client_id -1"),
        (CONFIG, 0, None, 1, "--host missing"),
        (CONFIG, 0, "127.0.0.1", None, "--port missing"),
        (CONFIG, 0, None, None, "--host and --port missing"),
        (CONFIG, 0, "127.0.0.1", 65536, "--port is 65536"),
        (CONFIG, 0, "127.0.0.1", 0, "--port is 0"),
        (Config(link=LinkConfig(transport="mpi")), 0, "127.0.0.1", 1, "--link.transport mpi"),
        (Config(train=TrainConfig(schedule="centralised")), 0, "127.0.0.1", 1, "has no clients"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    config: Config, client_id: int | None, host: str | None, port: int | None, words: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        place_from_outside(config, client_id=client_id, host=host, port=port)
    assert words in str(refused.value)


@pytest.mark.parametrize("host", ["", " ", "two words", "http://127.0.0.1", "ä..b", "a\nb", "x" * 70, "[::1", "-"])
def test_odd_host_names_are_refused(host: str) -> None:
    with pytest.raises(ConfigError, match=r"--host .*give a name or address alone") as refused:
        reachable_name(host)
    assert "\n" not in str(refused.value)


def test_host_names_are_given_in_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [])
    assert reachable_name("[::1]") == "::1"
    assert reachable_name("münchen.site") == "xn--mnchen-3ya.site"
    assert reachable_name("gpu_03-ib.site") == "gpu_03-ib.site"


def test_nobody_listens_until_the_deadline() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(PeerLost, match=rf"nobody answers at 127.0.0.1:{port} after 0.3 s \(Connection refused\)"):
            wait_for_store("127.0.0.1", port, 0.3)


def test_a_store_that_comes_late_is_waited_for() -> None:
    with socket.socket() as late:
        late.bind(("127.0.0.1", 0))
        timer = threading.Timer(0.4, late.listen)
        timer.start()
        wait_for_store("127.0.0.1", late.getsockname()[1], 10)
        timer.join()


def test_its_place_is_left_free_by_the_others() -> None:
    config = Config(train=TrainConfig(clients=3), run=RunConfig(outside_clients=2))
    check_world(2, config)
    for wrong in (1, 3, 4):
        with pytest.raises(TopologyError, match=f"{wrong} processes .* without --run.outside_clients 2 need 2"):
            check_world(wrong, config)


def test_impossible_outside_clients_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--run.outside_clients 3 exceeds --train.clients 2"):
        Config(run=RunConfig(outside_clients=3))
    with pytest.raises(ConfigError, match=r"--run.outside_clients 1 does not work with --link.transport mpi"):
        Config(run=RunConfig(outside_clients=1), link=LinkConfig(transport="mpi"))


@pytest.mark.parametrize(
    ("flags", "word"),
    [(("--client_id", "x"), "--client_id is x; it must be int"), (("--link.keys_dir", "{none}"), "client-1.key")],
)
def test_the_command_says_it_in_one_line_before_it_waits(flags: tuple[str, ...], word: str, tmp_path: Path) -> None:
    given = [flag.replace("{none}", str(tmp_path)) for flag in flags]
    command = [sys.executable, JOIN, *TINY, "--host", "127.0.0.1", "--port", "9", "--client_id", "1", *given]
    finished = run_command(command, tmp_path, timeout_s=30)
    assert finished.code == 2
    (line,) = finished.err.splitlines()
    assert word in line


def test_a_port_where_something_else_listens_is_given_up(tmp_path: Path) -> None:
    """It takes the connection and says nothing."""
    from hpc.link.stores import join_tcp_store

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        start = time.monotonic()
        with pytest.raises(PeerLost, match=rf"nobody answers at 127.0.0.1:{port} after 1 s"):
            join_tcp_store("127.0.0.1", port, timeout_s=1)
        assert time.monotonic() - start < 5
