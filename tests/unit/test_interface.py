"""Which address links use: the one asked for, else the one that leads to trunk rank 0."""

from __future__ import annotations

import os
import socket

import pytest

from hpc.errors import ConfigError
from hpc.link.interface import (
    ADDRESS_KEY,
    LOOPBACK,
    address_of,
    address_towards,
    agree_on_address,
    interface_of,
    interfaces,
)

THERE = {"lo": ["127.0.0.1"], "eth0": ["10.0.0.7", "fd00::7"], "ib0": ["10.1.0.7"], "eth1": []}


class Board(dict[str, bytes]):
    """A store of one process."""

    def set(self, key: str, value: str, /) -> None:
        self[key] = value.encode()

    def get(self, key: str, /) -> bytes:  # type: ignore[override]
        return self[key]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("wanted", "address"), [("eth0", "10.0.0.7"), ("ib0", "10.1.0.7"), ("127.0.0.1", "127.0.0.1")])
def test_an_interface_stands_for_its_first_address(wanted: str, address: str) -> None:
    assert address_of(wanted, THERE) == address


@pytest.mark.parametrize(
    ("wanted", "rule"),
    [("ib7", "'ib7' is no interface"), ("eth1", "has no address"), ("203.0.113.9", "not an address of this machine")],
)
def test_what_is_not_there_is_refused_with_what_is(wanted: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule) as refused:
        address_of(wanted, THERE)
    assert "eth0 (10.0.0.7, fd00::7), eth1 (no address), ib0 (10.1.0.7), lo (127.0.0.1)" in str(refused.value)


def test_this_machine_has_loopback() -> None:
    assert LOOPBACK in interfaces()["lo"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.1.1"])
def test_on_loopback_all_stays_there(host: str) -> None:
    assert address_towards(host).startswith("127.0.")
    assert interface_of(address_towards(host), interfaces()) == "lo"


def test_the_way_to_an_own_address_is_that_address() -> None:
    for addresses in interfaces().values():
        for address in addresses:
            assert address_towards(address) == address


def test_a_name_in_this_machines_own_file_leads_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian lets a machine's name lead to 127.0.1.1 there; other hosts could do nothing with that."""
    answer = [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.1.1", 9))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: answer)
    assert address_towards("node7") == address_towards("")
    assert address_towards("localhost").startswith("127.")


def test_a_name_without_address_and_none_at_all_lead_out() -> None:
    assert address_towards("no such host") == address_towards("")


def test_others_take_the_way_to_trunk_rank_0() -> None:
    board = Board()
    assert agree_on_address(board, "", "127.0.0.1", first=True) == LOOPBACK
    assert board[ADDRESS_KEY] == b"127.0.0.1"
    assert agree_on_address(board, "", "another name of it", first=False) == LOOPBACK
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


def test_an_interface_by_flag_is_for_every_library() -> None:
    assert agree_on_address(Board(), "lo", "203.0.113.9", first=True) == LOOPBACK
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("lo", "=lo")


def test_gloos_own_variable_counts_where_no_flag_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,eth9")
    assert agree_on_address(Board(), "", "203.0.113.9", first=True) == LOOPBACK
    with pytest.raises(ConfigError, match="ib7"):
        agree_on_address(Board(), "ib7", "", first=True)
