"""Two hosts on one machine: network namespaces joined by cables (veth pairs), gone again whatever happens.

The hosts are `a` and `b`, by name host-a and host-b; on cable i they have the addresses 10.77.i.1 and 10.77.i.2, and
their names lead to those on cable 0. Nothing else is reachable, unless a line to this machine is asked for.
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

TIMEOUT_S = 20.0


def run_ip(*arguments: str) -> str:
    return _output("ip", *arguments)


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout


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
        return f"this machine makes no network namespaces: {_said(error)}"


def why_no_slow_cable(mbit: int, burst: str) -> str:
    """Why no cable can be slowed down to so much (see `Hosts.slow_down`); empty if one can."""
    if reason := why_not():
        return reason
    try:
        with two_hosts() as hosts:
            hosts.slow_down(mbit, burst=burst)
            return ""
    except subprocess.CalledProcessError as error:
        return f"tc limits no cable to {mbit} Mbit/s here: {_said(error)}"


def _said(error: subprocess.CalledProcessError) -> str:
    return " ".join(str(error.stderr).split())


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

    @property
    def here(self) -> str:
        """This machine's address as both hosts reach it, where there are lines to it."""
        return self._on_line(1)

    def _on_line(self, number: int) -> str:
        # 198.18.0.0/15 is set aside for benchmarks (RFC 2544); the tag keeps two pairs of hosts apart.
        return f"198.18.{int(self.tag[:2], 16)}.{number}"

    def command(self, host: str, *command: str) -> list[str]:
        """`command`, to be run on that host, under its name."""
        under_its_name = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', f"host-{host}")
        return ["ip", "netns", "exec", self.namespace(host), *under_its_name, *command]

    def cut(self, cable: int = 0) -> None:
        """Pull the cable out; addresses stay."""
        run_ip("-n", self.namespace("b"), "link", "set", self.device(cable), "down")

    def mend(self, cable: int = 0) -> None:
        run_ip("-n", self.namespace("b"), "link", "set", self.device(cable), "up")

    def slow_down(self, mbit: int, cable: int = 0, *, burst: str = "16kb") -> None:
        """Both directions carry at most so much from now on. `burst`: at least what passes in a tick of the clock."""
        for host in "ab":
            limit = ("tbf", "rate", f"{mbit}mbit", "burst", burst, "latency", "200ms")
            _output("tc", "-n", self.namespace(host), "qdisc", "add", "dev", self.device(cable), "root", *limit)

    def bytes_sent(self, host: str, cable: int = 0) -> int:
        """Bytes that have left this host so far."""
        counter = f"/sys/class/net/{self.device(cable)}/statistics/tx_bytes"
        return int(_output(*self.command(host, "cat", counter)))

    def processes(self) -> list[int]:
        """Whoever still lives on either host."""
        shown = [run_ip("netns", "pids", self.namespace(host)) for host in "ab"]
        return [int(number) for text in shown for number in text.split()]

    def make(self, *, lines: bool) -> None:
        """Namespaces, cables and lines. Raises `CalledProcessError`."""
        names = "".join(f"{self.address(host)} host-{host}\n" for host in "ab")
        for host in "ab":
            own_files = _own_files(self.namespace(host))
            own_files.mkdir(parents=True)
            (own_files / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (own_files / "nsswitch.conf").write_text("hosts: files\n")  # name servers would only be waited for
            run_ip("netns", "add", self.namespace(host))
            run_ip("-n", self.namespace(host), "link", "set", "lo", "up")
        for cable in range(self.cables):
            self._lay_cable(cable)
        for host in "ab" if lines else "":
            self._lay_line(host)

    def _lay_cable(self, cable: int) -> None:
        ends = [["name", self.device(cable), "netns", self.namespace(host)] for host in "ab"]
        run_ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in "ab":
            where = ("-n", self.namespace(host))
            run_ip(*where, "addr", "add", f"{self.address(host, cable)}/24", "dev", self.device(cable))
            run_ip(*where, "link", "set", self.device(cable), "up")

    def _lay_line(self, host: str) -> None:
        """It leads to this machine and nowhere else; it goes with the namespace."""
        namespace, there = self.namespace(host), self._on_line(2 + "ab".index(host))
        run_ip("link", "add", namespace, "type", "veth", "peer", "name", "line", "netns", namespace)
        for end, own, other in ((("dev", namespace), self.here, there), (("dev", "line"), there, self.here)):
            where = ("-n", namespace) if own == there else ()
            run_ip(*where, "addr", "add", own, "peer", f"{other}/32", *end)
            run_ip(*where, "link", "set", *end, "up")

    def remove(self) -> None:
        """And every process on them."""
        for host in "ab":
            if (Path("/run/netns") / self.namespace(host)).exists():
                for pid in run_ip("netns", "pids", self.namespace(host)).split():
                    with suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run_ip("netns", "delete", self.namespace(host))
            shutil.rmtree(_own_files(self.namespace(host)), ignore_errors=True)


@contextmanager
def two_hosts(cables: int = 1, *, lines: bool = False) -> Iterator[Hosts]:
    """Make the hosts and their cables; remove them, and every process on them, at the end.

    `lines`: both also reach this machine, at `Hosts.here`, over a line of their own that is no cable.
    """
    hosts = Hosts(tag=secrets.token_hex(3), cables=cables)
    try:
        hosts.make(lines=lines)
        yield hosts
    finally:
        hosts.remove()


def _own_files(namespace: str) -> Path:
    """`ip netns exec` lays these over the files in /etc."""
    return Path("/etc/netns") / namespace
