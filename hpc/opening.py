"""A trunk rank's links: made before the first step, and where the run can go on without a client, at any time."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.admission import Admission
from hpc.agreement import agreement
from hpc.config import Config
from hpc.errors import DataError, HandshakeError, HpcError, IdentityError, Paused
from hpc.link.channel import Channel
from hpc.link.connect import open_server_channel
from hpc.link.handshake import Session
from hpc.link.identity import Authorised, client_name
from hpc.link.key_exchange import verify
from hpc.link.peers import SignedEphemeral
from hpc.rendezvous import Rendezvous
from hpc.report.events import EventLog
from hpc.served import Served
from hpc.topology import clients_of_trunk_rank

if TYPE_CHECKING:
    from torch.distributed import Store

FOLDER = "run.folder"

_log = logging.getLogger("hpc")


class Opening:
    """The channels of one trunk rank, and who may come later."""

    def __init__(self, meeting: Rendezvous, config: Config, events: EventLog, *, facts: dict[str, str]) -> None:
        """`facts`: what each client is told in its handshake, as `folder_told` reads it."""
        self._facts = facts
        self._meeting, self._config, self._events = meeting, config, events
        self._clients = clients_of_trunk_rank(meeting.place.index, config)
        self._agreed = agreement(config)
        self._early: list[tuple[str, dict[str, Any]]] | None = []  # what happens before the events begin
        self.channels: dict[int, Channel] = {}
        self.served: Served | None = None
        """Who takes part, once the run has begun."""
        self.admission: Admission | None = None

    def open(self) -> None:
        """Link this rank's clients. Raises `PeerLost` if too few come, `IdentityError`, `HandshakeError`."""
        config = self._config
        if not config.train.min_clients:
            for client in self._clients:
                self.channels[client] = self._connect(client, 0, None)
            return
        self.admission = Admission(
            self._clients,
            starts=self._meeting.starts(),
            connect=lambda client, epoch: self._connect(client, epoch, self._meeting.another_store()),
            is_here=self._is_here,
            refused=self._refused,
            timeout_s=config.link.timeout_s,
            start_patience_s=config.link.start_patience_s,
            clients_meet=config.train.clients_meet,
        )
        # How many of the other ranks' clients have come, the ranks tell each other before the first step.
        least = config.train.min_clients if config.trunk.ranks == 1 else 0
        self.channels.update(self.admission.first(least=least))
        for client in self._clients:
            if client not in self.channels:
                self._note("client_lost", step=1, client_id=client, why="it has not come yet")
                _log.warning("client %d has not come; the run begins without it, and it may come later", client)

    def began(self) -> None:
        """The events have begun: what was held back is noted."""
        early, self._early = self._early or [], None
        for name, fields in early:
            self._events.note(name, **fields)

    def check_key(self, client: int, message: bytes) -> None:
        """Raise `IdentityError` unless this is the client's signed key for this run, as its peers will demand."""
        key = SignedEphemeral.from_bytes(message)
        if key.client_id != client or key.run_id != self._meeting.run_id():
            raise IdentityError(f"client {client} sent a key of client {key.client_id} for run {key.run_id[:8]}")
        pinned = Authorised.load(self._config.link.keys_dir).by_client_id()
        verify(pinned[client], key.digest(), "peer key", key.signature, who=client_name(client))

    def __enter__(self) -> Opening:
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        """Whatever happens, the peers hear why this role ends, and no link stays open."""
        if self.admission is not None:
            self.admission.close(paused=isinstance(error, Paused))
        close_links(self.channels, error)

    def _connect(self, client: int, epoch: int, store: Store | None) -> Channel:
        transport = self._meeting.link(client, epoch=epoch, store=store)
        link = self._config.link
        agreed, facts = self._agreed, self._facts
        return open_server_channel(transport, link=link, client_id=client, agreement=agreed, facts=facts)[0]

    def _is_here(self, client: int) -> bool:
        return client in self.channels if self.served is None else self.served.is_here(client)

    def _refused(self, client: int, why: str) -> None:
        _log.warning("client %d was refused: %s", client, why)
        self._note("client_refused", client_id=client, why=why)

    def _note(self, name: str, **fields: Any) -> None:
        if self._early is None:
            self._events.note(name, **fields)
        else:
            self._early.append((name, fields))


def facts_of_run(folder: Path) -> dict[str, str]:
    """What the server tells its clients, sealed: anybody could have put it into the store."""
    return {FOLDER: str(folder)}


def folder_told(session: Session, config: Config) -> Path:
    """A client's run folder: its own choice, or what the server told. Raises `HandshakeError` if it told none."""
    told = session.facts.get(FOLDER)
    if not isinstance(told, str) or not told:
        raise HandshakeError("the server told no folder of the run; run the same version on both ends")
    return Path(config.run.folder or told)


def close_links(channels: dict[int, Channel], error: BaseException | None) -> None:
    """Let the peers hear why this role ends, if it is for an error; who is paused knows already."""
    for channel in channels.values():
        if error is not None and not isinstance(error, Paused):
            channel.send_error(reason_for_peers(error))
        channel.close()


def reason_for_peers(error: BaseException) -> str:
    """Why this role ends, without anything of its data: messages about data quote it."""
    if isinstance(error, DataError):
        return "bad data; its own output says which"
    return str(error) if isinstance(error, HpcError) else type(error).__name__
