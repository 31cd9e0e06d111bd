"""`launch` with forked roles: how a role's end, and the nursery's, reaches the user. No role here imports torch."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc import nurslings
from hpc.config import Config, RunConfig
from hpc.last_words import RoleFailed
from hpc.launcher import launch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Config(run=RunConfig(device="cpu"))
NURSERY = (
    f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    "from hpc.nursery import main\nsys.exit(main(sys.argv[1:], imports=()))\n"
)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(nurslings.SWITCH, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(tmp_path: Path, nursery: str, role: str) -> None:
    (tmp_path / "nursery.py").write_text(nursery)
    (tmp_path / "train.py").write_text(role)
    try:
        launch(CONFIG, tmp_path / "train.py", ["--flag"])
    finally:
        left = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
        assert not left.split()


@pytest.mark.parametrize("switch", ["1", "0"])
def test_every_role_runs_once_forked_or_not(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nurslings.SWITCH, switch)
    role = (
        "import os, sys\nfrom pathlib import Path\n"
        "names = 'WORLD_SIZE LOCAL_RANK MASTER_ADDR HPC_THREADS OMP_WAIT_POLICY HPC_STORE_FD'.split()\n"
        "text = ' '.join([*sys.argv[1:], *(os.environ.get(name, '-') for name in names[:-1])])\n"
        "text += f' {names[-1] in os.environ} {os.getppid()}'\n"
        "(Path(__file__).parent / os.environ['RANK']).write_text(text)\n"
    )
    run(tmp_path, NURSERY, role)
    found = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    for rank, (flag, size, local_rank, address, threads, policy, hosts, _) in enumerate(found):
        assert (flag, size, local_rank, address) == ("--flag", "3", str(rank), "127.0.0.1")
        assert int(threads) >= 1
        assert policy == "PASSIVE"
        assert hosts == str(rank == 0)
    parents = {int(words[-1]) for words in found}
    assert len(parents) == 1
    assert (os.getpid() in parents) == (switch == "0")


def test_a_role_that_dies_wordlessly(tmp_path: Path) -> None:
    role = "import os, signal, time\nos.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else None\n"
    with pytest.raises(RoleFailed, match=r"^killed by SIGKILL \(client-0\)$"):
        run(tmp_path, NURSERY, role)


def test_a_nursery_that_dies_is_named(tmp_path: Path) -> None:
    nursery = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n"
    with pytest.raises(RoleFailed, match=r"the process that starts the roles was killed by SIGKILL.*HPC_NURSERY=0"):
        run(tmp_path, nursery, "")
