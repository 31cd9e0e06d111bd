"""Clients die, hang, come back, or come who should not: real processes, real SIGKILL; the others go on."""

from __future__ import annotations

import re
import signal
import statistics
import time
from pathlib import Path

import pytest

from hpc.link.identity import ensure_local
from hpc.nurslings import Nursery
from hpc.report.events import Event
from tests.faults.federation import Federation, federation
from tests.faults.record import record

pytestmark = pytest.mark.timeout(240)
STEPS = 40
SPARING = ("--train.max_steps", str(STEPS), "--train.min_clients", "1", "--train.lr_scheduler", "constant")
NOTICED_S = 2.0  # from a closed connection to the event; a tenth of it on a quiet machine


def all_well(run: Federation, *names: str) -> None:
    assert set(run.end(*names).values()) == {0}
    assert run.steps("trunk-0")[-1] == STEPS


def noticed_s(event: Event, at: float) -> float:
    return float(event["time"]) - at


@pytest.mark.parametrize("place", ["sending", pytest.param("computing", marks=pytest.mark.long), "waiting"])
def test_a_client_is_killed(place: str, nursery: Nursery, keys: Path, tmp_path: Path) -> None:
    """The step under way is dropped for it; who notices, and when, does not depend on what it was doing."""
    with federation(nursery, tmp_path, keys, *SPARING) as run:
        run.start("trunk-0", "client-0", "client-2")
        run.start("client-1", dies_at="" if place == "waiting" else f"{place}:9")
        if place == "waiting":  # for the trunk, which waits for another client
            run.await_step(9)
            run.kill("client-0", signal.SIGSTOP)
            time.sleep(0.5)
            run.kill("client-1")
            run.kill("client-0", signal.SIGCONT)
        lost = run.await_event("client_lost", client_id=1, within_s=60)
        run.until(lambda: run.roles["client-1"].poll() is not None, "end of client-1", 5)
        all_well(run, "trunk-0", "client-0", "client-2")
        assert run.roles["client-1"].returncode == -signal.SIGKILL
        assert lost["step"] == 10 or place == "waiting"
        assert re.search("client.1", lost["why"])
        # Steps that it took part in are whole; of the one under way there is nothing of it.
        assert run.steps("client-1") == list(range(1, lost["step"]))
        assert run.steps("client-0") == run.steps("client-2") == list(range(1, STEPS + 1))
        before = run.events("client-1", "step")[-1]["time"]
        noticed = float(lost["time"]) - before  # since its last whole step, so with some of the next
        assert noticed < NOTICED_S
        seconds = {event["step"]: event["seconds"]["total"] for event in run.events("trunk-0", "step")}
        earlier = statistics.median(seconds[step] for step in seconds if 2 < step < lost["step"])
        later = statistics.median(seconds[step] for step in seconds if step > lost["step"])
        record(
            fault=f"SIGKILL of a client while it is {place}",
            goes_on=f"the others, from the same step on (median step {earlier:.2f} s before, {later:.2f} s after)",
            lost="its part of the step under way",
            message=f"trunk-0: client 1 is lost; the run goes on without it: {lost['why']}",
            noticed_s=noticed,
        )


def test_killed_clients_come_back(nursery: Nursery, keys: Path, tmp_path: Path) -> None:
    """Two at once; both are noticed at once, come back with their identities, and take part to the end."""
    with federation(nursery, tmp_path, keys, *SPARING, "--train.max_steps", "400") as run:
        run.start()
        run.await_step(5)
        at = run.kill("client-1")
        run.kill("client-2")
        seen = [noticed_s(run.await_event("client_lost", client_id=k), at) for k in (1, 2)]
        assert max(seen) < NOTICED_S
        record(
            fault="SIGKILL of two clients at once",
            goes_on="the third client, alone",
            lost="their part of the step under way",
            message="trunk-0: client 1 is lost; the run goes on without it: …",
            noticed_s=max(seen),
        )
        before = time.time()
        run.start("client-1", "client-2", again=True)
        back = [run.await_event("client_returned", client_id=k, within_s=60) for k in (1, 2)]
        for k, event in zip((1, 2), back, strict=True):
            run.await_step(event["step"] + 2, role=f"client-{k}")
        record(
            fault="return of a killed client with the same identity",
            goes_on="all; it is given what the others have learned, sealed, by one of them",
            lost="the steps in which it was away",
            message="trunk-0: client 1 is back; it takes part from step … on",
            noticed_s=max(event["time"] for event in back) - before,
        )
        run.kill("trunk-0", signal.SIGUSR1)
        codes = run.end("trunk-0", "client-0", "client-1+", "client-2+")
        assert set(codes.values()) == {75}, (codes, run.said("trunk-0"))


def test_a_stopped_client_is_given_up_at_the_deadline(nursery: Nursery, keys: Path, tmp_path: Path) -> None:
    timeout_s = 3.0
    with federation(nursery, tmp_path, keys, *SPARING, timeout_s=timeout_s) as run:
        run.start()
        run.await_step(5)
        at = run.kill("client-1", signal.SIGSTOP)
        lost = run.await_event("client_lost", client_id=1)
        assert timeout_s - 1 < noticed_s(lost, at) < timeout_s + 3
        assert "silent" in lost["why"]
        all_well(run, "trunk-0", "client-0", "client-2")
        record(
            fault=f"SIGSTOP of a client (a hung peer; link.timeout_s {timeout_s:g})",
            goes_on="the others, after link.timeout_s",
            lost="its part of the step under way",
            message=f"trunk-0: client 1 is lost; the run goes on without it: {lost['why']}",
            noticed_s=noticed_s(lost, at),
        )
        run.kill("client-1", signal.SIGCONT)
        assert run.end("client-1")["client-1"] != 0  # it learns that it was given up


def test_who_must_not_join_is_refused(nursery: Nursery, keys: Path, tmp_path: Path) -> None:
    """In mid-run: a client under a wrong key, and one that is there already; neither does any harm."""
    ensure_local(tmp_path / "strangers", 3)
    (tmp_path / "mixed").mkdir()
    ensure_local(tmp_path / "mixed", 3)
    for name in ("server.pem",):
        (tmp_path / "mixed" / name).write_bytes((keys / name).read_bytes())
    with federation(nursery, tmp_path, keys, *SPARING, "--train.max_steps", "400") as run:
        run.start()
        run.await_step(5)
        run.start("client-0", again=True)
        code = run.end("client-0+")["client-0+"]
        assert code == 1
        assert "takes part already" in run.said("client-0")
        at = run.kill("client-1")
        lost = run.await_event("client_lost", client_id=1)
        assert noticed_s(lost, at) < NOTICED_S
        run.start("client-1", keys=tmp_path / "mixed", again=True)
        assert run.end("client-1+")["client-1+"] == 2
        refused = [event["why"] for event in run.events("trunk-0", "client_refused")]
        assert any("not authorised" in why for why in refused), refused
        step = run.steps("trunk-0")[-1]
        run.await_step(step + 5)
        for fault, why in (
            ("the same client id twice", run.said("client-0")),
            ("a client with a wrong key joins in mid-run", run.said("client-1")),
        ):
            record(fault=fault, goes_on="all", lost="nothing", message=f"client: {why}", noticed_s=None)
        run.kill("trunk-0", signal.SIGUSR1)
        assert run.end("trunk-0")["trunk-0"] == 75
