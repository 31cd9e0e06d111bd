"""Links between real processes: handshake, sealed frames both ways, and a killed peer noticed at once.

Run as a script, this file is one role of such a link: `test_links.py gloo|mpi ROLE KEYS_DIR PORT TASK`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 90.0
SIZES = (0, 1, 4096, 65_536, 65_537, 300_000, 3_000_000)  # elements of 4 bytes
CLIENT_ID = 0


@contextmanager
def store_port() -> Iterator[int]:
    """A rendezvous store on a free port, as a launcher offers it."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield store.port
    del store


def start(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*launcher, sys.executable, __file__, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT
    )


def finish(process: subprocess.Popen[str], timeout_s: float = DEADLINE_S) -> str:
    """The output; never leaves the process running."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.kill()
    return output


def mpirun() -> tuple[str, ...]:
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("no mpirun beside python or in PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=30).stdout
    open_mpi = ("--allow-run-as-root", "--oversubscribe") if "Open MPI" in version else ()
    return (found, *open_mpi, "-n", "2")


def test_gloo_link_carries_sealed_tensors_both_ways(pristine_keys: Path) -> None:
    with store_port() as port:
        roles = [start("gloo", role, str(pristine_keys), str(port), "echo") for role in ("server", "client")]
        server, client = [finish(process) for process in roles]
    assert "server done" in server, server
    assert "client done" in client, client


def test_killed_peer_is_noticed_at_once(pristine_keys: Path) -> None:
    with store_port() as port:
        server = start("gloo", "server", str(pristine_keys), str(port), "wait")
        client = start("gloo", "client", str(pristine_keys), str(port), "sleep")
        try:
            assert client.stdout is not None
            assert "client connected" in client.stdout.readline()
            client.kill()
            killed = time.monotonic()
            output = finish(server)
        finally:
            client.kill()
            server.kill()
            client.communicate()
    assert "server: PeerLost: client-0: connection closed" in output, output
    assert "waiting for SMASHED" in output, output
    assert time.monotonic() - killed < 10.0


def test_silent_peer_is_lost_at_the_deadline(pristine_keys: Path) -> None:
    with store_port() as port:
        server = start("gloo", "server", str(pristine_keys), str(port), "wait-briefly")
        client = start("gloo", "client", str(pristine_keys), str(port), "sleep")
        try:
            output = finish(server)
        finally:
            client.kill()
            client.communicate()
    assert "server: PeerLost: client-0: silent after 1." in output, output


@pytest.mark.mpi
def test_mpi_link_carries_sealed_tensors_both_ways(pristine_keys: Path) -> None:
    output = finish(start("mpi", "both", str(pristine_keys), "0", "echo", launcher=mpirun()))
    assert "server done" in output, output
    assert "client done" in output, output


@pytest.mark.mpi
def test_silent_mpi_peer_is_lost_at_the_deadline(pristine_keys: Path) -> None:
    output = finish(start("mpi", "both", str(pristine_keys), "0", "wait-briefly", launcher=mpirun()))
    assert "server: PeerLost: client-0: silent after 1." in output, output


# --- the roles


def role_main(transport_name: str, role: str, keys_dir: str, port: str, task: str) -> None:
    from hpc.config import LinkConfig
    from hpc.errors import HpcError
    from hpc.link.connect import open_client_channel, open_server_channel

    if transport_name == "mpi":
        from mpi4py import MPI

        role = ("server", "client")[MPI.COMM_WORLD.Get_rank()]
    link = LinkConfig(keys_dir=keys_dir, timeout_s=1.0 if task == "wait-briefly" and role == "server" else 30.0)
    transport = make_transport(transport_name, role, port)
    open_channel = open_server_channel if role == "server" else open_client_channel
    channel, session = open_channel(transport, link=link, client_id=CLIENT_ID, agreement={"task": "test"})
    print(f"{role} connected to {session.peer_name}", flush=True)
    try:
        if task == "echo":
            echo(role, channel)
        elif role == "server":
            wait_for_frame(channel)
        else:
            time.sleep(3.0 if transport_name == "mpi" else 60.0)
    except HpcError as error:
        print(f"{role}: {type(error).__name__}: {error}", flush=True)


def make_transport(name, role, port):  # type: ignore[no-untyped-def]
    rank, peer = (0, "client-0") if role == "server" else (1, "server")
    if name == "mpi":
        from hpc.link.mpi import MpiTransport, link_communicator

        return MpiTransport(link_communicator(), other=1 - rank, peer=peer)
    import torch.distributed as dist

    from hpc.link.gloo import connect_gloo

    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=30))
    return connect_gloo(store, client_id=CLIENT_ID, rank=rank, timeout_s=30.0, peer=peer)


def echo(role, channel):  # type: ignore[no-untyped-def]
    """The client sends tensors of many sizes and gets each of them back twice as large in value."""
    import torch

    from hpc.link.frame import Header, Kind

    for step, size in enumerate(SIZES):
        tensor = torch.arange(size, dtype=torch.float32)
        if role == "client":
            channel.send(Header(kind=Kind.SMASHED, step=step, lengths=(size % 1000,)), tensor)
            answer = channel.recv(Kind.TRUNK_OUT)
            assert torch.equal(answer.tensor, 2 * tensor), f"{size} elements came back altered"
        else:
            frame = channel.recv(Kind.SMASHED)
            assert (frame.header.step, frame.header.lengths) == (step, (size % 1000,))
            channel.send(Header(kind=Kind.TRUNK_OUT), 2 * frame.tensor)
    channel.close()
    print(f"{role} done", flush=True)


def wait_for_frame(channel):  # type: ignore[no-untyped-def]
    from hpc.link.frame import Kind

    channel.recv(Kind.SMASHED)


if __name__ == "__main__":
    role_main(*sys.argv[1:6])
