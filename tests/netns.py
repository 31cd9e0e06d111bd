"""Two hosts on one machine: network namespaces joined by cables (veth pairs), gone again whatever happens.

The hosts are `a` and `b`, by name host-a and host-b; on cable i they have the addresses 10.77.i.1 and 10.77.i.2, and
their names lead to those on cable 0. Nothing else is reachable.
"""

from __future__ import annotations

import functools
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


def run_ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20).stdout


@functools.cache
def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "network namespaces need ip and tc (iproute2)"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"this machine makes no network namespaces: {error.stderr.strip()}"


needs_namespaces = pytest.mark.skipif("bool(__import__('tests.netns').netns.why_not())", reason="see tests/netns.py")


@dataclass(kw_only=True, frozen=True)
class Hosts:
    """Two namespaces; `tag` is in the names of all that belongs to them."""

    tag: str
    cables: int

    def namespace(self, host: str) -> str:
        return f"hpc-{self.tag}-{host}"

    @staticmethod
    def device(cable: int = 0) -> str:
        """The cable's name at both ends."""
        return f"cable{cable}"

    @staticmethod
    def address(host: str, cable: int = 0) -> str:
        return f"10.77.{cable}.{'ab'.index(host) + 1}"

    def command(self, host: str, *command: str) -> list[str]:
        """`command`, to be run on that host, under its name."""
        under_its_name = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host-{host}")
        return ["ip", "netns", "exec", self.namespace(host), *under_its_name, *command]

    def cut(self, cable: int = 0) -> None:
        """Pull the cable out; addresses stay."""
        run_ip("-n", self.namespace("b"), "link", "set", self.device(cable), "down")

    def mend(self, cable: int = 0) -> None:
        run_ip("-n", self.namespace("b"), "link", "set", self.device(cable), "up")

    def slow_down(self, mbit: int, cable: int = 0) -> None:
        """Both directions carry at most so much from now on."""
        for host in "ab":
            limit = ["tbf", "rate", f"{mbit}mbit", "burst", "16kb", "latency", "200ms"]
            shape = ["tc", "qdisc", "add", "dev", self.device(cable), "root", *limit]
            subprocess.run(self.command(host, *shape), check=True, capture_output=True, timeout=20)

    def bytes_sent(self, host: str, cable: int = 0) -> int:
        """Bytes that have left this host so far."""
        counter = f"/sys/class/net/{self.device(cable)}/statistics/tx_bytes"
        shown = subprocess.run(self.command(host, "cat", counter), check=True, capture_output=True, text=True)
        return int(shown.stdout)

    def processes(self) -> list[int]:
        """Whoever still lives on either host."""
        shown = [run_ip("netns", "pids", self.namespace(host)) for host in "ab"]
        return [int(number) for text in shown for number in text.split()]


@contextmanager
def two_hosts(cables: int = 1) -> Iterator[Hosts]:
    """Make the hosts and their cables; remove them, and every process on them, at the end."""
    hosts = Hosts(tag=secrets.token_hex(3), cables=cables)
    try:
        names = "".join(f"{hosts.address(host)} host-{host}\n" for host in "ab")
        for host in "ab":
            own_files = _own_files(hosts.namespace(host))
            own_files.mkdir(parents=True)
            (own_files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (own_files / "nsswitch.conf").write_text("hosts: files\n")  # name servers would only be waited for
            run_ip("netns", "add", hosts.namespace(host))
            run_ip("-n", hosts.namespace(host), "link", "set", "lo", "up")
        for cable in range(cables):
            ends = [["name", hosts.device(cable), "netns", hosts.namespace(host)] for host in "ab"]
            run_ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for host in "ab":
                where = ("-n", hosts.namespace(host))
                run_ip(*where, "addr", "add", f"{hosts.address(host, cable)}/24", "dev", hosts.device(cable))
                run_ip(*where, "link", "set", hosts.device(cable), "up")
        yield hosts
    finally:
        for host in "ab":
            if (Path("/run/netns") / hosts.namespace(host)).exists():
                for pid in run_ip("netns", "pids", hosts.namespace(host)).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run_ip("netns", "delete", hosts.namespace(host))
            shutil.rmtree(_own_files(hosts.namespace(host)), ignore_errors=True)


def _own_files(namespace: str) -> Path:
    """`ip netns exec` lays these over the files in /etc."""
    return Path("/etc/netns") / namespace
