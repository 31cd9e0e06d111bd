"""Places that cannot be: hosts, ports, ranks and folders. Each is refused in one line before torch is loaded."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc.config import Config, LinkConfig, RunConfig, TrainConfig
from hpc.errors import ConfigError, HpcError, IdentityError, ModelError, TopologyError
from hpc.link.identity import ensure_local, make
from hpc.preflight import check_meeting_point, check_output
from hpc.source.cache import cache_root
from hpc.topology import World, place, read_world

ROOT = Path(__file__).resolve().parents[2]
RANK = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_PORT": "29511"}


@pytest.mark.parametrize(
    "address", ["node_1", "gpu-03.cluster.local", "10.0.0.7", "fe80::1%eth0", "::1", "::ffff:10.0.0.7", "NODE7."]
)
def test_odd_host_names_that_are_names(address: str) -> None:
    assert read_world({**RANK, "MASTER_ADDR": address}).master_addr == address


@pytest.mark.parametrize(
    "address", ["gpu[01-03]", "höst", "a b", "host:29511", "http://host", "$(hostname)", "a,b", "host\n", "[::1]:80"]
)
def test_what_is_no_host_name(address: str) -> None:
    for launcher in (RANK, {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"}, {}):
        with pytest.raises(TopologyError, match="MASTER_ADDR is"):
            read_world({**launcher, "MASTER_ADDR": address})


def test_an_empty_address_is_none_at_all() -> None:
    assert read_world({**RANK, "MASTER_ADDR": ""}).master_addr == "127.0.0.1"


@pytest.mark.parametrize("port", ["0", "-1", "65536", "ten", ""])
def test_what_is_no_port(port: str) -> None:
    with pytest.raises(TopologyError, match="MASTER_PORT is"):
        read_world({**RANK, "MASTER_PORT": port})


def test_a_rank_without_a_world() -> None:
    with pytest.raises(TopologyError, match="RANK is set and WORLD_SIZE is not"):
        read_world({"RANK": "1"})


@pytest.mark.parametrize("rank", ["-1", "3"])
def test_a_rank_outside_of_its_world(rank: str) -> None:
    with pytest.raises(TopologyError, match=f"rank {rank} of 3"):
        place(read_world({**RANK, "RANK": rank}), Config(train=TrainConfig(clients=2)))


def test_a_host_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    world = read_world({**RANK, "MASTER_ADDR": "no-such-host.invalid"})
    with pytest.raises(TopologyError, match=r"no-such-host\.invalid.*MASTER_ADDR"):
        check_meeting_point(world, Config())
    assert len(waited) == 2, "a resolver may fail for a moment"
    check_meeting_point(world, Config(link=LinkConfig(rendezvous="/shared")))
    check_meeting_point(read_world({**RANK, "MASTER_ADDR": "localhost"}), Config())
    alone = World(launcher="none", global_rank=0, world_size=1, local_rank=0, master_addr="x.invalid", master_port=1)
    check_meeting_point(alone, Config())


def refusal(folder: object) -> str:
    with pytest.raises(ConfigError) as caught:
        check_output(Config(run=RunConfig(output_dir=str(folder))))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_output_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "run"):
        assert f"{tmp_path / 'file'} is a file" in refusal(folder)
    assert "cannot be written" in refusal("/proc/1/run")  # read-only to everybody, whatever its access bits say
    assert "UTF-8" in refusal(f"{tmp_path}/\udcff")
    assert not (tmp_path / "a").exists()


def test_folders_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    folder = tmp_path / "a b" / "Größe 漢字 'x'"
    check_output(Config(run=RunConfig(output_dir=str(folder))))
    assert not any(tmp_path.iterdir())
    assert ensure_local(folder / "keys", 1) == ["server", "client-0"]


def test_key_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "keys", "/proc/1/keys", "/proc/1"):
        for attempt in (lambda f=folder: ensure_local(f, 1), lambda f=folder: make(f, "server")):
            with pytest.raises(IdentityError):
                attempt()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HPC_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(ModelError, match="HPC_CACHE"):
        cache_root()


def test_a_terminal_that_lacks_a_letter_ends_no_run() -> None:
    code = "from hpc.cli import run_main\nrun_main(lambda argv: print('results in Größe') or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, b"results in Gr\\xf6\\xdfe\n")


@pytest.mark.parametrize(
    ("variables", "flags", "word"),
    [
        ({**RANK, "RANK": "0", "MASTER_ADDR": "gpu[01-03]"}, (), "MASTER_ADDR"),
        ({}, ("--run.output_dir", "{file}/run"), "is a file"),
        ({}, ("--link.keys_dir", "{file}/keys"), "--link.keys_dir"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    variables: dict[str, str], flags: tuple[str, ...], word: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    script = "train.py" if variables else "local.py"
    own = [flag.format(file=tmp_path / "file") for flag in flags]
    own = own if "--run.output_dir" in own else [*own, "--run.output_dir", str(tmp_path / "o")]
    recipe = ["--config", str(ROOT / "launch" / "recipes" / "tiny.yaml")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / script), *recipe, *own],
        capture_output=True,
        text=True,
        timeout=60,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin", **variables},
    )
    assert done.returncode == HpcError.exit_code + 1
    (line,) = done.stderr.splitlines()
    assert word in line
    assert not (tmp_path / "o").exists()
