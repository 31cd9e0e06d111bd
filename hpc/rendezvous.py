"""How the processes of a run find each other: one TCP store, one link a client, one group of trunk ranks."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hpc.agreement import lasting_agreement
from hpc.checkpoint import Attempt
from hpc.config import Config
from hpc.errors import CheckpointError, PeerLost, TopologyError
from hpc.launcher import STORE_FD
from hpc.link.broken import lost_if_broken
from hpc.link.gloo import CLIENT, SERVER, connect_gloo
from hpc.link.interface import agree_on_address
from hpc.link.meeting_file import meeting_name, open_store
from hpc.link.mpi_library import load_mpi
from hpc.link.stores import join_tcp_store
from hpc.link.transport import Transport, choose_transport
from hpc.process import device_of
from hpc.resume import find
from hpc.schedule import total_steps
from hpc.topology import Place

log = logging.getLogger("hpc")

FOLDER_KEY, RUN_KEY, START_KEY, TRANSPORT_KEY = "run/folder", "run/id", "run/start", "run/transport"
STARTS_KEY = "run/starts/{}"


class Rendezvous:
    """This process's connection to the store and to its peers."""

    def __init__(self, place: Place, config: Config) -> None:
        self.place, self.config = place, config
        self.store = _of_this_restart(self._open_store())
        if place.role == "baseline":  # it has no link
            return
        self.transport_name = self._agree_on_transport()
        self.address = agree_on_address(
            self.store, config.link.interface, self._meeting_host, first=place.name == "trunk-0"
        )
        if self.transport_name == "mpi":
            from hpc.link.mpi import link_communicator

            self._communicator = link_communicator()

    def _agree_on_transport(self) -> str:
        """Trunk rank 0 chooses for all: two ends that choose by what they see might choose differently."""
        if self.place.name == "trunk-0":
            outside = self.config.run.outside_clients > 0  # neither in MPI's world nor beside these GPUs
            gpus = 0 if self.config.run.device == "cpu" or outside else torch.cuda.device_count()
            chosen = choose_transport(
                self.config.link.transport,
                under_mpi=self.place.world.launcher == "mpi" and not outside,
                distinct_gpus=gpus >= self.place.world.world_size,
            )
            self.store.set(TRANSPORT_KEY, chosen)
        with lost_if_broken("trunk rank 0 is gone or silent"):
            return str(self.store.get(TRANSPORT_KEY).decode())

    def _open_store(self) -> dist.Store:
        if folder := self.config.link.rendezvous:
            self._meeting_host = ""
            name = meeting_name(self.config.link.port, self.config.run.name, os.environ)
            return open_store(folder, name, hosts=self.place.name == "trunk-0", timeout_s=self.config.link.timeout_s)
        world, timeout = self.place.world, timedelta(seconds=self.config.link.timeout_s)
        port = self.config.link.port if self.config.link.port and world.launcher != "env" else world.master_port
        hosts = self.place.name == "trunk-0" and not world.agent_hosts_store
        address = world.master_addr
        if world.launcher == "mpi" and "MASTER_PORT" not in os.environ:
            address, port = _agree_over_mpi(port if self.config.link.port else 0, world.world_size)
        self._meeting_host = address
        if not hosts:
            return join_tcp_store(address, port, timeout_s=self.config.link.timeout_s)
        listener = int(os.environ[STORE_FD]) if STORE_FD in os.environ else None
        try:
            return dist.TCPStore(
                address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=listener
            )
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise TopologyError(f"port {port} is taken; give another --link.port ({_first(error)})") from None

    def announce(self) -> int:
        """A client says that it has started; returns how often it had before. Raises `PeerLost`."""
        with lost_if_broken("trunk rank 0 is gone or silent"):
            epoch = int(self.store.add(STARTS_KEY.format(self.place.index), 1)) - 1
        if epoch and not self.config.train.min_clients:
            raise PeerLost(
                f"client {self.place.index} has started in this run before, and without --train.min_clients a run "
                "takes nobody back: end the other process, or start the run anew"
            )
        return epoch

    def starts(self) -> Callable[[int], int]:
        """How often a client has started, asked over a connection of its own, so in any thread."""
        store = self.another_store()

        def of(client: int) -> int:
            key = STARTS_KEY.format(client)
            return int(store.get(key)) if store.check([key]) else 0  # a store in a file grows with each `add`

        return of

    def another_store(self) -> dist.Store:
        """The same store over another connection: whoever waits on one keeps it from everybody else."""
        store: Any = self.store  # torch's own declarations lack it
        return store.clone()

    def link(self, client_id: int, *, epoch: int = 0, store: dist.Store | None = None) -> Transport:
        """The two-ended transport between a client, at its start number `epoch`, and its trunk rank."""
        store = store or self.store
        trunk_side = self.place.role == "trunk"
        timeout_s = self.config.link.timeout_s
        peer = f"client {client_id}" if trunk_side else f"trunk rank {client_id % self.config.trunk.ranks}"
        if self.transport_name == "mpi":
            from hpc.link.mpi import MpiTransport

            other = self.config.trunk.ranks + client_id if trunk_side else client_id % self.config.trunk.ranks
            return MpiTransport(self._communicator, other=other, peer=peer)
        rank = SERVER if trunk_side else CLIENT
        if self.transport_name == "nccl":
            from hpc.link.nccl import connect_nccl

            return connect_nccl(
                store,
                client_id=client_id,
                epoch=epoch,
                rank=rank,
                device=device_of(self.config, self.place),
                timeout_s=timeout_s,
                peer=peer,
            )
        return connect_gloo(
            store,
            client_id=client_id,
            rank=rank,
            timeout_s=timeout_s,
            peer=peer,
            epoch=epoch,
            address=self.address,
        )

    def open_trunk_group(self, device: torch.device) -> None:
        """The default process group: trunk ranks only, since DeepSpeed takes it for its whole world."""
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("trunk", self.store),
            rank=self.place.index,
            world_size=self.config.trunk.ranks,
            timeout=timedelta(seconds=trunk_patience_s(self.config)),
        )

    def output_folder(self) -> str:
        """The run's folder: as configured, or the name that trunk rank 0 makes up and tells the others."""
        configured = self.config.run.folder
        if self.place.name == "trunk-0":
            folder = configured or made_up_folder(self.config)
            self.store.set(RUN_KEY, secrets.token_hex(16))
            self.store.set(FOLDER_KEY, folder)
            return folder
        return configured or self.store.get(FOLDER_KEY).decode()

    def take_up(self, folder: Path) -> tuple[int, Attempt, list[int]]:
        """Where the run begins (0, or the step of the checkpoint that trunk rank 0 found in its folder), for all roles.

        The last are the clients who have nothing in that checkpoint.

        Raises `CheckpointError` if there is none, or if this role was told to resume and trunk rank 0 was not.
        """
        wanted = self.config.run.resume_from_checkpoint
        if self.place.name == "trunk-0":
            self.store.set(START_KEY, json.dumps(start_of(self.config, folder)))
        step, takes_up, newcomers = json.loads(self.store.get(START_KEY))
        if wanted is not None and not step:
            raise CheckpointError(
                f"--run.resume_from_checkpoint {wanted}: trunk rank 0 begins from scratch; give every role the flag"
            )
        return step, Attempt(name=self.run_id(), takes_up=takes_up), newcomers

    def run_id(self) -> str:
        """A name that no other run has; clients bind their keys for each other to it."""
        return str(self.store.get(RUN_KEY).decode())


def start_of(config: Config, folder: Path) -> tuple[int, str, list[int]]:
    """The step to begin behind, the attempt whose checkpoint that is, and the clients who have nothing in it.

    Raises `CheckpointError`.
    """
    wanted = config.run.resume_from_checkpoint
    if wanted is None:
        return 0, "", []
    found = find(folder, wanted, lasting_agreement(config), steps=total_steps(config.train))
    (log.warning if found.passed_over else log.info)("%s", found)
    clients = range(config.train.clients)
    newcomers = [] if found.clients is None else [k for k in clients if k not in found.clients]
    changes = newcomers or (found.clients is not None and len(found.clients) > len(clients))
    if changes and config.train.averages and found.step % config.train.sync_every:
        raise CheckpointError(
            f"checkpoint-{found.step} lies between two averages (--train.sync_every {config.train.sync_every}), where "
            f"the clients' parts differ, and is of clients {list(found.clients or ())}, not of {len(clients)} clients; "
            "resume with the same clients, or from a checkpoint at an average"
        )
    return found.step, found.attempt, newcomers


def _of_this_restart(store: dist.Store) -> dist.Store:
    """torchrun's own store outlives its workers: what a former group of them has left there must not be read."""
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return dist.PrefixStore(f"restart/{restarts}", store) if restarts else store


def trunk_patience_s(config: Config) -> float:
    """How long trunk ranks wait for each other: longer than one of them may wait for its silent clients in turn, or for
    one that loads its part.
    """
    waits = 1 if config.train.min_clients == 0 else 2 + -(-config.train.clients // config.trunk.ranks)
    return max(waits * config.link.timeout_s, config.link.start_patience_s + config.link.timeout_s)


def made_up_folder(config: Config) -> str:
    """results/runs/<date>-<time>-<schedule>, with a number behind it if that is taken."""
    base = f"results/runs/{time.strftime('%Y%m%d-%H%M%S')}-{config.train.schedule}"
    folder, number = base, 2
    while os.path.exists(folder):
        folder, number = f"{base}-{number}", number + 1
    return folder


def _agree_over_mpi(port: int, processes: int) -> tuple[str, int]:
    comm = load_mpi(processes).COMM_WORLD

    def free() -> int:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return int(probe.getsockname()[1])

    mine = f"{socket.gethostname()} {port or free()}".encode().ljust(300) if comm.rank == 0 else bytes(300)
    buffer = bytearray(mine)
    comm.Bcast(buffer, root=0)  # the upper-case call: bytes, no pickle
    host, number = buffer.decode().split()
    return host, int(number)


def _first(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120]
