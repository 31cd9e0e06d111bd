"""A client from outside the job: where it goes and which rank it is there. No torch: a mistake is told at once."""

from __future__ import annotations

import ipaddress
import socket
import time

from hpc.config import Config
from hpc.errors import ConfigError, PeerLost
from hpc.topology import Place, World

_RETRY_S = 0.25


def place_from_outside(config: Config, *, client_id: int | None, host: str | None, port: int | None) -> Place:
    """The role of client `client_id` of a run whose store is at `host` and `port`, or in `link.rendezvous`.

    Raises ConfigError for a missing flag, a client that the run does not have, or a host without an address.
    """
    last = config.train.clients - 1
    if client_id is None:
        raise ConfigError(f"--client_id is missing; say which of the clients 0 to {last} this is")
    if not 0 <= client_id <= last:
        raise ConfigError(f"--client_id {client_id}: --train.clients {config.train.clients} makes them 0 to {last}")
    if config.train.schedule == "centralised":
        raise ConfigError("--train.schedule centralised has no clients; choose a federated schedule")
    if config.link.transport == "mpi":
        raise ConfigError("--link.transport mpi joins only ranks of one mpirun; use --link.transport gloo on all sides")
    if config.link.rendezvous:
        address = ""
    else:
        missing = [flag for flag, value in (("--host", host), ("--port", port)) if value is None]
        if missing or host is None:
            raise ConfigError(f"{' and '.join(missing)} missing: where trunk rank 0's store is; or --link.rendezvous")
        address = reachable_name(host)
    if port is not None and not 0 < port < 65536:
        raise ConfigError(f"--port is {port}; it must be 1 to 65535")
    world = World(
        launcher="env",
        global_rank=config.trunk.ranks + client_id,
        world_size=config.world_size,
        local_rank=0,
        master_addr=address,
        master_port=port or 0,
    )
    return Place(role="client", index=client_id, world=world)


def reachable_name(host: str) -> str:
    """`host` as sockets take it: in ASCII, an IPv6 address without its brackets.

    Raises ConfigError for one that has no address, which torch would look up again and again until the deadline.
    """
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    advice = "give a name or address alone, with the port in --port"
    try:
        name = name if _is_address(name) else name.encode("idna").decode()
        if not name or any(letter.isspace() for letter in name):
            raise ConfigError(f"--host {host!r} is no host name; {advice}")
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(f"--host {host!r} has no address ({reason}); {advice}") from None
    return name


def wait_for_store(host: str, port: int, timeout_s: float) -> None:
    """Until somebody listens there. Raises PeerLost: one line, where torch would print pages about each try."""
    deadline, reason = time.monotonic() + timeout_s, ""
    while (left := deadline - time.monotonic()) > 0:
        try:
            socket.create_connection((host, port), timeout=left).close()
            return
        except OSError as error:
            reason = f" ({error.strerror or error})"
        time.sleep(min(_RETRY_S, left))
    raise PeerLost(f"nobody answers at {host}:{port} after {timeout_s:g} s{reason}: is trunk rank 0 running?")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
