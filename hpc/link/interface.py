"""Which address of this machine the links use. No torch: the decision is made from names and addresses alone.

Left to itself, Gloo looks this machine's name up, which fails where the name is unknown (a container, a network
namespace) or leads to another network than the one on which the peers are.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from hpc.errors import ConfigError

LOOPBACK = "127.0.0.1"
ADDRESS_KEY = "run/address"
_GIVE_ADDRESS = 0x8915  # SIOCGIFADDR of <linux/sockios.h>
_ANYWHERE = "198.51.100.1"  # one of RFC 5737's example networks: reached, if at all, by the default route
_PORT = 9  # discard; nothing is sent, since connecting a UDP socket only looks the route up


class Board(Protocol):
    """What this module needs of a `torch.distributed` store."""

    def set(self, key: str, value: str, /) -> Any: ...

    def get(self, key: str, /) -> bytes: ...


def interfaces() -> dict[str, list[str]]:
    """This machine's network interfaces and their addresses: IPv4 first, IPv6 without link-local ones."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name, addresses in found.items():
            with suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(probe, _GIVE_ADDRESS, struct.pack("256s", os.fsencode(name)[:15]))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    table = Path("/proc/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else []:
        digits, *_, name = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(digits))
        if not address.is_link_local:
            found.setdefault(name, []).append(str(address))
    return found


def interface_of(address: str, there: Mapping[str, list[str]]) -> str | None:
    """The interface that has this address; None if none lists it."""
    if ipaddress.ip_address(address).is_loopback:
        address = LOOPBACK if ipaddress.ip_address(address).version == 4 else address
    return next((name for name, addresses in there.items() if address in addresses), None)


def address_of(wanted: str, there: Mapping[str, list[str]]) -> str:
    """The address that `link.interface` asks for: an interface's first, or the address given.

    Raises ConfigError, listing what there is, for an unknown name, one without address, or a foreign address.
    """
    if there.get(wanted):
        return there[wanted][0]
    listed = ", ".join(f"{name} ({', '.join(found) or 'no address'})" for name, found in sorted(there.items()))
    if wanted in there:
        raise ConfigError(f"--link.interface {wanted} has no address; is it up? This machine has {listed}")
    try:
        address = ipaddress.ip_address(wanted)
    except ValueError:
        raise ConfigError(f"--link.interface {wanted!r} is no interface or address here; there are {listed}") from None
    if not _is_mine(str(address)):
        raise ConfigError(f"--link.interface {wanted} is not an address of this machine; there are {listed}")
    return str(address)


def address_towards(host: str) -> str:
    """The address of this machine from which `host` is reached; of no host in particular, the one that leads out.

    A host name that leads to loopback is this machine's own, looked up in its own file: others know it by another
    address, so it is taken for none.
    """
    for candidate in _addresses_of(host):
        if ipaddress.ip_address(candidate).is_loopback and not _is_loopback_name(host):
            break
        if (source := _source(candidate)) is not None:
            return source
    return _source(_ANYWHERE) or _first_network() or LOOPBACK


def agree_on_address(board: Board, wanted: str, host: str, *, first: bool) -> str:
    """This role's address for links. Trunk rank 0 (`first`) tells the others its own, and they find the way to it.

    `host`: where the store is, or empty if it is a file. Raises ConfigError (see `address_of`).
    """
    there = interfaces()
    named = wanted or os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    mine = address_of(named, there) if named else None
    if first:
        mine = mine or address_towards(host)
        board.set(ADDRESS_KEY, mine)
    mine = mine or address_towards(board.get(ADDRESS_KEY).decode())
    if name := interface_of(mine, there):  # of the trunk's own groups
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        if wanted:  # left to itself, NCCL finds a good one
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
    return mine


def _addresses_of(host: str) -> list[str]:
    """IPv4 first: Gloo's two ends must be of one family."""
    try:
        found = socket.getaddrinfo(host, _PORT, type=socket.SOCK_DGRAM) if host else []
    except (OSError, UnicodeError):
        return []
    return [str(each[4][0]) for each in sorted(found, key=lambda each: each[0] != socket.AF_INET)]


def _is_loopback_name(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _source(address: str) -> str | None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, _PORT))
        return str(probe.getsockname()[0])
    return None


def _first_network() -> str | None:
    """For machines on networks that lead nowhere else."""
    found = (address for addresses in interfaces().values() for address in addresses)
    return next((address for address in found if not ipaddress.ip_address(address).is_loopback), None)


def _is_mine(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return True
    return False
