"""Ports: can roles on this machine meet, and is another machine to be reached?"""

from __future__ import annotations

import socket
from contextlib import closing

from hpc.doctor.finding import Asked, Finding, fail, ok

REACH_S = 5.0


def ports(asked: Asked) -> Finding:
    """A port to listen at, and a connection to it from here."""
    port = asked.config.link.port
    try:
        listener = socket.create_server(("", port))
    except OSError as error:
        return fail(
            f"--link.port {port} cannot be listened at ({error.strerror})", "choose another --link.port, or 0 for any"
        )
    with closing(listener):
        bound = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", bound), timeout=REACH_S):
            pass
    which = f"--link.port {port} is free" if port else f"any free port, such as {bound}"
    return ok(f"{which}; this host is {socket.gethostname()}, {address_of(socket.gethostname())}")


def address_of(host: str) -> str:
    """Its IP address, or that it has none: other hosts may still know it."""
    try:
        return str(socket.getaddrinfo(host, None)[0][4][0])
    except (OSError, UnicodeError):
        return "a name without an address here"


def reach(asked: Asked) -> Finding:
    """Whether something listens at --host and --port."""
    if asked.host is None:
        return ok("not asked; --host NAME --port NUMBER tries another machine, such as trunk rank 0's")
    port = asked.port or asked.config.link.port
    if not port:
        return fail(f"--host {asked.host} without a port", "give --port")
    place = f"{asked.host}:{port}"
    try:
        address = socket.getaddrinfo(asked.host, port, type=socket.SOCK_STREAM)[0][4][0]
    except (OSError, UnicodeError) as error:
        return fail(f"{asked.host} is not known here ({error})", "use an address, or mend DNS or /etc/hosts")
    try:
        with socket.create_connection((asked.host, port), timeout=REACH_S):
            return ok(f"{place} ({address}) answers")
    except ConnectionRefusedError:
        return fail(f"{place} ({address}) is there, but nothing listens", "start trunk rank 0 first, with this port")
    except OSError as error:
        cure = "a firewall, or no route: open the port, or use --link.rendezvous FOLDER on a shared file system"
        return fail(f"{place} ({address}) does not answer within {REACH_S:g} s ({error})", cure)
