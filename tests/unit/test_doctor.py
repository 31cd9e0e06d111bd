"""Each check on something that is really broken: what it finds, how to mend it, and that nothing stops the others."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpc.config import Config, LinkConfig, ModelConfig, RunConfig, TrainConfig
from hpc.doctor import files, machine, mpi, network, slurm, software
from hpc.doctor.finding import Asked, Finding, examine, ok, output_of
from hpc.doctor.visit import CHECKS, broken, print_table, to_json
from hpc.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def asked(
    *, keys_dir: object = "keys", port: int = 0, transport: Any = "auto", folder: object = None, **more: Any
) -> Asked:
    link = LinkConfig(keys_dir=str(keys_dir), port=port, transport=transport)
    run = RunConfig(output_dir=str(folder) if folder else None)
    return Asked(config=Config(link=link, run=run, train=TrainConfig(clients=3)), **more)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("", 0)) as listener:
        yield listener.getsockname()[1]


# --- how checks are run


def test_a_check_that_raises_or_hangs_stops_no_other() -> None:
    def refuses(asked: Asked) -> Finding:
        raise ConfigError("--x is 1; it must be 2")

    def falls_ill(asked: Asked) -> Finding:
        raise KeyError("x")

    def hangs(asked: Asked) -> Finding:
        time.sleep(5)
        return ok("never")

    checks = {"a": refuses, "b": hangs, "c": falls_ill, "d": lambda asked: ok("well")}
    start = time.monotonic()
    found = examine(checks, asked(), alone=("d",), deadline_s=0.3)
    assert time.monotonic() - start < 2
    assert list(found) == ["a", "b", "c", "d"]
    assert [finding.status for finding in found.values()] == ["fail", "fail", "fail", "ok"]
    assert found["a"].found == "--x is 1; it must be 2"
    assert "0.3 s" in found["b"].found
    assert "KeyError" in found["c"].found
    assert broken(found)
    assert json.loads(to_json(found))["status"] == "fail"


def test_a_command_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    code, _, err = output_of(["sh", "-c", f"sleep 60 & echo $! > {mark}; wait"], timeout_s=0.5)
    assert (code, "0.5 s" in err) == (124, True)
    deadline = time.monotonic() + 5
    while (stat := Path(f"/proc/{mark.read_text().strip()}/stat")).exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.05)


# --- keys


def test_keys_as_they_should_be_show_the_fingerprint_and_no_secret(keys_dir: Path) -> None:
    from hpc.link.identity import load_private, short

    found = files.keys(asked(keys_dir=keys_dir))
    server = load_private(keys_dir, "server")
    assert found.status == "ok"
    assert short(server.fingerprint) in found.found
    assert "3 clients authorised" in found.found
    assert str(server.key.d) not in found.found


def test_a_key_that_others_can_read(keys_dir: Path) -> None:
    (keys_dir / "client-1.key").chmod(0o644)
    found = examine({"keys": files.keys}, asked(keys_dir=keys_dir))["keys"]
    assert found.status == "fail"
    assert f"chmod 600 {keys_dir / 'client-1.key'}" in found.found


def test_a_server_nobody_pins_and_a_client_nobody_lets_in(keys_dir: Path) -> None:
    (keys_dir / "authorized_clients" / "client-2.pem").unlink()
    assert files.keys(asked(keys_dir=keys_dir)).status == "warn"
    (keys_dir / "server.pem").unlink()
    assert files.keys(asked(keys_dir=keys_dir)).status == "fail"


def test_no_keys_yet(tmp_path: Path) -> None:
    found = files.keys(asked(keys_dir=tmp_path / "none"))
    assert found.status == "warn"
    assert "launch/keys.py make" in found.cure


# --- folders, clock, model


def test_an_output_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    found = files.output(asked(folder=tmp_path / "not" / "yet"))
    assert found.status == "ok", found
    assert "GiB free" in found.found
    assert not any(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be_and_a_folder_nobody_writes_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files.output(asked(folder=tmp_path / "file" / "run")).status == "fail"
    found = files.output(asked(folder="/proc/1/run"))  # not even root can
    assert found.status == "fail"
    assert "--run.output_dir" in found.cure


def test_a_clock_that_is_an_hour_behind_the_file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.clock(asked(folder=tmp_path)).status == "ok"
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    found = files.clock(asked(folder=tmp_path))
    assert found.status == "warn"
    assert "3600" in found.found or "3599" in found.found


def test_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def status(name: object) -> str:
        return files.model(Asked(config=Config(model=ModelConfig(name_or_path=str(name))))).status

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    found = [status(name) for name in ("tiny-llama", tmp_path / "model", tmp_path / "empty", "/no/such", "some/model")]
    assert found == ["ok", "ok", "fail", "fail", "warn"]


# --- machine and software


def test_the_machine_and_its_cipher() -> None:
    assert machine.memory(asked()).status in ("ok", "warn")
    assert machine.free_memory() > 2**20
    assert "GB/s" in machine.cipher(asked()).found


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (64, 1024))
    found = machine.limits(asked())
    assert found.status == "warn"
    assert "ulimit -n 304" in found.cure


def test_versions_other_than_the_tested_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'torch==9.9.9\npeft==1; python_version < "3.0"\npeft==2; python_version >= "3.0"\n# transformers==3\n'
    assert software.pins(text) == {"torch": "9.9.9", "peft": "2"}
    (tmp_path / "constraints.txt").write_text("torch==9.9.9\n")
    monkeypatch.setattr(software, "CONSTRAINTS", tmp_path / "constraints.txt")
    found = software.libraries(asked())
    assert found.status == "warn"
    assert "9.9.9" in found.found
    monkeypatch.setattr(software, "LIBRARIES", ("torch", "no-such-library"))
    assert software.libraries(asked()).found == "not installed: no-such-library"


def test_no_compiler_for_an_operator_that_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = software.operator(asked())
    assert found.status == "warn"
    assert "a C++ compiler and ninja" in found.found
    (tmp_path / "op.so").touch()
    assert software.operator(asked()).status == "ok"


# --- network


def test_a_port_that_is_taken(taken: int) -> None:
    found = network.ports(asked(port=taken))
    assert found.status == "fail"
    assert f"--link.port {taken}" in found.found
    assert network.ports(asked()).status == "ok"


def test_another_machine(taken: int) -> None:
    assert network.reach(asked()).status == "ok"
    assert network.reach(asked(host="127.0.0.1", port=taken)).status == "ok"
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "nothing listens" in network.reach(asked(host="127.0.0.1", port=port)).found
    for odd in ("no such host.invalid", "\N{SNOWMAN}" * 70, "a..b"):
        found = network.reach(asked(host=odd, port=port))
        assert found.status == "fail"
        assert "not known" in found.found


# --- MPI and Slurm


def test_no_mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert mpi.mpi(asked()).status == "warn"
    found = mpi.mpi(asked(transport="mpi"))
    assert found.status == "fail"
    assert "mpirun is not found" in found.found


def test_an_mpirun_of_another_mpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts two processes, each of which is alone in its world."""
    fake = tmp_path / "mpirun"
    fake.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\nshift 2\n{sys.executable} -c "raise SystemExit(3)"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    (tmp_path / "python").symlink_to(shutil.which("true") or "/bin/true")
    assert "do not exchange" in mpi.mpi(asked(transport="mpi")).found


@pytest.mark.skipif(shutil.which("sinfo") is None, reason="Slurm's commands are not installed")
def test_a_controller_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PATIENCE_S", 1.0)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "no.conf"))
    found = slurm.slurm(asked())
    assert found.status == "fail"
    assert str(tmp_path / "no.conf") in found.cure


def test_no_slurm_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("SLURM_CONF", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm.slurm(asked()).status == "ok"
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert slurm.slurm(asked()).status == "fail"


def test_partitions_with_a_node_that_is_up() -> None:
    told = "gpu* up 3 idle\ngpu* up 1 down*\ncpu up 2 mixed\nold down 4 idle\nlost up 5 drained\n"
    assert slurm.partitions(told) == ["gpu (3 nodes)", "cpu (2 nodes)"]


# --- the script


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launch" / "doctor.py"), *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, env={**os.environ})


def test_the_script_tells_all_checks_and_its_exit_code(keys_dir: Path, tmp_path: Path) -> None:
    own = ("--link.keys_dir", str(keys_dir), "--run.output_dir", str(tmp_path / "o"))
    recipe = ("--config", str(ROOT / "launch" / "recipes" / "tiny.yaml"))
    done = run(*recipe, *own, "--json")
    told = json.loads(done.stdout)
    assert [check["check"] for check in told["checks"]] == list(CHECKS)
    status = {check["check"]: check["status"] for check in told["checks"]}
    needed = ("python", "torch", "gpus", "cipher", "keys", "model", "output", "ports")
    assert {name: status[name] for name in needed} == dict.fromkeys(needed, "ok")
    assert done.returncode == (1 if "fail" in status.values() else 0)
    assert "Traceback" not in done.stderr


def test_the_script_fails_for_what_is_needed_and_refuses_wrong_flags(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("--only", "output", "--run.output_dir", str(tmp_path / "file"))
    assert done.returncode == 1
    assert "mend output" in done.stdout
    assert run("--only", "nothing").returncode == 2


def test_the_table_shows_the_cure(capsys: pytest.CaptureFixture[str]) -> None:
    print_table({"a": ok("well"), "b": Finding(status="warn", found="[ill]", cure="rest")})
    said = capsys.readouterr().out
    for words in ("well", "[ill]", "→ rest", "Ready to run; worth a look: b."):
        assert words in said
