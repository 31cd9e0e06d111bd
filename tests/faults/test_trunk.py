"""A trunk rank dies: nobody hangs, everybody says whom it lost, and the run goes on from its last checkpoint."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpc.nurslings import Nursery
from hpc.resume import committed_steps
from tests.faults.federation import federation
from tests.faults.record import record

pytestmark = pytest.mark.timeout(240)
TIMEOUT_S = 10.0


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.long)])
def test_a_trunk_rank_is_killed(rank: int, nursery: Nursery, keys: Path, tmp_path: Path) -> None:
    flags = ("--train.max_steps", "500", "--train.save_every", "5", "--train.save_total_limit", "2")
    with federation(nursery, tmp_path, keys, *flags, clients=2, trunks=2, timeout_s=TIMEOUT_S) as run:
        run.start()
        run.await_step(12)
        at = run.kill(f"trunk-{rank}")
        others = [name for name in run.names() if name != f"trunk-{rank}"]
        codes = run.end(*others, within_s=TIMEOUT_S + 10)
        noticed = time.time() - at
        assert set(codes.values()) == {1}
        client = run.said(f"client-{rank}")  # client k belongs to trunk rank k
        assert f"trunk rank {rank}" in client or "server" in client, client
        other = run.said(f"trunk-{1 - rank}")
        assert "trunk rank" in other or "client" in other, other
        record(
            fault=f"SIGKILL of trunk rank {rank} of 2",
            goes_on="nobody: all roles end; resumed from the last checkpoint, the run goes on",
            lost="the steps since the last checkpoint (train.save_every)",
            message=f"client-{rank}: {client}",
            noticed_s=noticed,
        )
        last = committed_steps(run.folder)[-1]
        assert last >= 10
    with federation(nursery, tmp_path / "again", keys, *flags, clients=2, trunks=2, timeout_s=TIMEOUT_S) as again:
        again.folder = run.folder
        again.flags += ["--run.output_dir", str(run.folder), "--run.resume_from_checkpoint", "latest"]
        again.flags += ["--train.max_steps", str(last + 2)]
        again.start()
        assert set(again.end().values()) == {0}, {name: again.said(name) for name in again.names()}
        assert again.steps("trunk-0")[-1] == last + 2
