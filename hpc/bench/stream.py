"""How much a cable carries: a process on one host sends, one on the other counts. This file is what both of them run.

`python stream.py receive ADDRESS` prints bytes a second; `python stream.py send ADDRESS`.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpc.bench.namespaces import Hosts

PORT = 29400
BYTES, PIECE = 2**29, 2**20
PATIENCE_S = 20.0


def measure_cable(hosts: Hosts) -> float:
    """Bytes a second over cable 0, from host a to host b. Raises `CalledProcessError` or `TimeoutExpired`."""
    ends = {"b": "receive", "a": "send"}
    started = []
    try:
        for host, act in ends.items():
            command = hosts.command(host, sys.executable, __file__, act, hosts.address("b"))
            started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        told = [process.communicate(timeout=2 * PATIENCE_S) for process in started]
        for process, (out, err) in zip(started, told, strict=True):
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, "a stream over the cable", out, err)
        return float(told[0][0])
    finally:
        for process in started:
            process.kill()


def receive(address: str) -> float:
    """Bytes a second, from the first to the last."""
    with socket.create_server((address, PORT)) as server:
        server.settimeout(PATIENCE_S)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(PATIENCE_S)
            received, room = connection.recv_into(bytearray(PIECE)), bytearray(PIECE)
            first, begin = received, time.perf_counter()
            while count := connection.recv_into(room):
                received += count
            return (received - first) / (time.perf_counter() - begin)


def send(address: str) -> None:
    """As soon as somebody listens."""
    deadline, piece = time.monotonic() + PATIENCE_S, bytes(PIECE)
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=PATIENCE_S)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    with connection:
        for _ in range(BYTES // PIECE):
            connection.sendall(piece)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        print(receive(sys.argv[2]))
    else:
        send(sys.argv[2])
