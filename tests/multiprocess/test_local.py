"""The entry points as a user types them: the same federation however it is started, equal losses everywhere."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hpc.link.identity import ensure_local
from hpc.report.events import read_events, role_path
from tests.key_forms import forms_of_key
from tests.runs import (
    EXPORT,
    LOCAL,
    ROOT,
    STEPS,
    TINY,
    TRAIN,
    Finished,
    clean_environment,
    local,
    rank_of,
    run_command,
    torchrun,
)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def keys(run_keys: Path) -> Path:
    return run_keys


@pytest.fixture(scope="module")
def reference(one_machine_run: Finished) -> Finished:
    return one_machine_run


@pytest.fixture(scope="module")
def losses(reference: Finished) -> list[float]:
    found: list[float] = reference.summary["losses"]
    return found


def grad_norms(folder: Path) -> list[float]:
    return [e["grad_norm"] for e in read_events(role_path(folder, "trunk-0")) if e["event"] == "step"]


def assert_bounds(found: list[float], expected: list[float]) -> None:
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-4)


def test_summary_has_what_is_promised(reference: Finished) -> None:
    summary = reference.summary
    promised = """schedule clients trunk_ranks steps seed model adapter transport encryption loss_first loss_last
        losses eval step_seconds tokens_per_second link_bytes_per_step seconds_per_step peak_rss_mib parameters
        versions"""
    for key in promised.split():
        assert summary[key] is not None, key
    assert "git_commit" in summary
    assert summary["transport"] == "gloo"
    assert summary["encryption"] == "aes-256-gcm"
    assert summary["steps"] == 4 == len(summary["losses"])


def test_a_run_leaves_its_files(reference: Finished) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "loss.png", "time.png", "tb"):
        assert (reference.folder / name).exists(), name


def test_every_role_keeps_a_log_and_the_last_lines_say_why(reference: Finished) -> None:
    how = f"run ended: finished after 4 steps, results in {reference.folder}"
    assert reference.out.splitlines()[-1] == how
    assert sorted(path.name for path in (reference.folder / "logs").iterdir()) == [
        f"{role}.log" for role in ("baseline", "client-0", "client-1", "trunk-0")
    ]
    losses = [repr(loss)[:8] for loss in reference.summary["losses"]]
    for role in ("client-0", "client-1", "trunk-0"):
        said = (reference.folder / "logs" / f"{role}.log").read_text()
        assert all(f" INFO {role} " in line for line in said.splitlines())
        for words in (
            "started: pid ",
            "linked to ",
            "aes-256-gcm",
            "run begins at step 1 of 4",
            "evaluation after step 4",
        ):
            assert words in said, (role, words)
        assert " run ended: finished" in said.splitlines()[-1]
        assert not any(loss in said for loss in losses)
    # The terminal shows none of that: what the user sees are progress and results.
    assert " INFO " not in reference.out + reference.err


def adapter_of(folder: Path, client: int = 0) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / f"client-{client}" / "adapter_model.safetensors")


def test_no_key_is_in_anything_that_a_run_leaves(reference: Finished, keys: Path) -> None:
    """Logs, events, TensorBoard, summary, config, checkpoints and the terminal, against each number of each key."""
    written = {str(path): path.read_bytes() for path in reference.folder.rglob("*") if path.is_file()}
    written |= {"stdout": reference.out.encode(), "stderr": reference.err.encode()}
    assert any("tfevents" in name for name in written)
    for path in keys.glob("*.key"):
        for form in forms_of_key(path):
            assert not [name for name, data in written.items() if form in data], path.name


def test_the_adapter_is_exported_once(reference: Finished, tmp_path: Path) -> None:
    command = [sys.executable, EXPORT, str(reference.folder), "--output_dir", str(tmp_path / "out")]
    exported = run_command(command, tmp_path)
    assert exported.code == 0, exported.err
    assert "client-0" in exported.out
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    own = adapter_of(reference.folder)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert found.keys() == own.keys()
    assert all(torch.equal(found[name], value) for name, value in own.items())
    again = run_command(command, tmp_path)
    assert again.code == 2
    (line,) = again.err.splitlines()
    assert "--output_dir" in line


def test_the_uncut_model_beside_the_run_has_the_same_losses(reference: Finished) -> None:
    baseline = reference.summary["baseline"]
    assert baseline["steps"] == 4
    assert baseline["loss_max_abs_difference"] < 1e-4


def test_nobody_holds_what_it_does_not_own(reference: Finished) -> None:
    """Counts of values and of tensors read from the model's file, against the model's own shapes."""
    from safetensors import safe_open

    from hpc.config import ModelConfig
    from hpc.source.resolve import resolve

    path = resolve(ModelConfig(name_or_path="tiny-llama"))("model.safetensors")
    assert path is not None
    with safe_open(path, framework="pt") as shard:
        keys = list(shard.keys())
        sizes = {key: shard.get_tensor(key).numel() for key in keys}
    blocks = [int(match[1]) if (match := re.search(r"layers\.(\d+)\.", key)) else None for key in keys]
    owned = {
        "trunk-0": {k for k, b in zip(keys, blocks, strict=True) if b in (1, 2)},
        "client-0": {k for k, b in zip(keys, blocks, strict=True) if b in (0, 3, None)},
    }
    summary = reference.summary
    for role, mine in owned.items():
        parts = summary["parameters_by_role"][role]
        base = sum(part["owned"] - part["trainable"] for part in parts.values())
        assert base == sum(sizes[k] for k in mine)
        assert summary["keys_read"][role] == len(mine)


def test_one_torchrun_process_starts_the_rest(losses: list[float], keys: Path, tmp_path: Path) -> None:
    assert local(tmp_path, keys, *STEPS, launcher=torchrun(1)).summary["losses"] == losses


def test_torchrun_with_a_process_for_each_role(losses: list[float], keys: Path, tmp_path: Path) -> None:
    assert local(tmp_path, keys, *STEPS, launcher=torchrun(3)).summary["losses"] == losses


def test_mpi_gives_the_same_bits(losses: list[float], keys: Path, tmp_path: Path) -> None:
    summary = local(tmp_path, keys, *STEPS, "--link.transport", "mpi").summary
    assert summary["transport"] == "mpi"
    assert summary["losses"] == losses


@pytest.mark.parametrize("stage", [*(pytest.param(each, marks=pytest.mark.long) for each in range(3)), 3])
def test_two_trunk_ranks_and_every_zero_stage(
    stage: int, reference: Finished, losses: list[float], keys: Path, tmp_path: Path
) -> None:
    json_file = ["--trunk.deepspeed", str(ROOT / "slurm" / "deepspeed" / f"zero{stage}.json")] if stage else []
    summary = local(tmp_path, keys, *STEPS, "--trunk.ranks", "2", *json_file).summary
    assert summary["trunk_ranks"] == 2
    assert_bounds(summary["losses"], losses)
    assert grad_norms(tmp_path) == pytest.approx(grad_norms(reference.folder), rel=1e-4)
    for client in range(2):  # of either trunk rank
        torch.testing.assert_close(adapter_of(tmp_path, client), adapter_of(reference.folder), rtol=0, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["zero3", "offload"])
def test_one_trunk_rank_with_zero_3(name: str, losses: list[float], keys: Path, tmp_path: Path) -> None:
    """DeepSpeed refuses a group of one where it believes in a world of three: it must take the trunk for the world."""
    json_file = str(ROOT / "slurm" / "deepspeed" / f"{name}.json")
    assert_bounds(local(tmp_path, keys, *STEPS, "--trunk.deepspeed", json_file).summary["losses"], losses)


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_serial_hands_the_parts_on(ranks: str, keys: Path, tmp_path: Path) -> None:
    serial = local(tmp_path / "s", keys, *STEPS, "--train.schedule", "serial", "--trunk.ranks", ranks).summary
    order = ("--train.schedule", "centralised", "--train.order", "sequential")
    whole = local(tmp_path / "c", keys, *STEPS, *order).summary
    if ranks == "1":
        assert serial["losses"] == whole["losses"]
    assert_bounds(serial["losses"], whole["losses"])
    assert serial["eval"]["accuracy"] == whole["eval"]["accuracy"]


# --- bad input: exit code 2, one line, no traceback, nothing left behind


def assert_refused(finished: Finished, *words: str) -> None:
    assert finished.code == 2, (finished.code, finished.err[-2000:])
    lines = [line for line in finished.err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert "Traceback" not in finished.err
    assert not finished.folder.exists() or not any(finished.folder.iterdir())


def test_a_cut_without_trunk(keys: Path, tmp_path: Path) -> None:
    assert_refused(local(tmp_path / "o", keys, "--model.head_blocks", "9"), "--model.head_blocks 9", "4 blocks")


def test_a_foreign_model_folder(keys: Path, tmp_path: Path) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    assert_refused(local(tmp_path / "o", keys, "--model.name_or_path", str(empty)), str(empty), "config.json")


def test_a_missing_model_folder(keys: Path, tmp_path: Path) -> None:
    assert_refused(local(tmp_path / "o", keys, "--model.name_or_path", "/no/such/model"), "/no/such/model")


def test_a_broken_line_names_file_and_line(keys: Path, tmp_path: Path) -> None:
    for client in range(2):
        good = json.dumps({"passage": "p", "question": "q", "label": True})
        (tmp_path / f"{client}.jsonl").write_text(f"{good}\n{good}\n" + ("{oops\n" if client else ""))
    file = str(tmp_path / "{client_id}.jsonl")
    finished = local(tmp_path / "o", keys, "--data.task", "jsonl", "--data.train_file", file)
    assert_refused(finished, "1.jsonl:3")


def test_a_client_without_data(keys: Path, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(json.dumps({"passage": "p", "question": "q", "label": True}) + "\n")
    flags = ("--data.task", "jsonl", "--data.train_file", str(tmp_path / "all.jsonl"), "--data.partition", "iid")
    assert_refused(local(tmp_path / "o", keys, *flags), "client 1", "--train.clients")


def test_a_port_that_is_taken(keys: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_refused(local(tmp_path / "o", keys, "--link.port", port), f"--link.port {port}", "taken")


def test_the_folder_of_a_finished_run(keys: Path, reference: Finished) -> None:
    before = (reference.folder / "summary.json").read_bytes()
    again = local(reference.folder, keys, *STEPS)
    assert again.code == 2
    for words in ("finished run", "--run.name", "--run.resume_from_checkpoint"):
        assert words in again.err
    assert (reference.folder / "summary.json").read_bytes() == before


def test_a_key_that_others_can_read(tmp_path: Path) -> None:
    ensure_local(tmp_path / "keys", 2)
    (tmp_path / "keys" / "client-1.key").chmod(0o644)
    assert_refused(local(tmp_path / "o", tmp_path / "keys"), "client-1.key", "chmod 600")


def test_a_revoked_client_is_refused_by_name(tmp_path: Path) -> None:
    from hpc.link.identity import revoke

    ensure_local(tmp_path / "keys", 2)
    revoke(tmp_path / "keys", "client-1")
    assert_refused(local(tmp_path / "o", tmp_path / "keys"), "client-1", "revoked")


def test_an_unknown_client_is_refused(tmp_path: Path) -> None:
    ensure_local(tmp_path / "keys", 2)
    ensure_local(tmp_path / "strangers", 2)
    (tmp_path / "strangers" / "client-1.key").rename(tmp_path / "keys" / "client-1.key")
    assert_refused(local(tmp_path / "o", tmp_path / "keys"), "client-1", "not authorised", "keys.py authorise")


@pytest.mark.parametrize("processes", [2, 4])
def test_a_world_that_does_not_fit(processes: int, keys: Path, tmp_path: Path) -> None:
    finished = local(tmp_path / "o", keys, launcher=torchrun(processes))
    assert finished.code != 0
    line = next(line for line in finished.err.splitlines() if line.startswith("error:"))
    for word in (f"{processes} processes", "--trunk.ranks 1", "--train.clients 2", "need 3"):
        assert word in line


def start_by_hand(
    keys: Path, folder: Path, *flags: str, client_flags: tuple[str, ...] = ()
) -> dict[str, tuple[int, str]]:
    """Trunk and one client as two commands; exit code and stderr of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = [*TINY, "--train.clients", "1", "--link.keys_dir", str(keys), "--link.timeout_s", "60"]
    common += ["--run.output_dir", str(folder), *flags]
    processes = {}
    for rank, (role, own) in enumerate({"trunk": (), "client": client_flags}.items()):
        env = clean_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        processes[role] = subprocess.Popen(
            [sys.executable, TRAIN, *common, *own], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
        )
    ended = {}
    for role, process in processes.items():
        err = process.communicate(timeout=90)[1]
        ended[role] = (process.returncode, err)
    return ended


def test_another_cut_at_the_other_end(keys: Path, tmp_path: Path) -> None:
    """Different flags on the two ends: both show both values."""
    for code, err in start_by_hand(keys, tmp_path / "o", client_flags=("--model.head_blocks", "2")).values():
        assert code == 2, err
        for words in ("model.head_blocks", "1", "2"):
            assert words in err
        assert "Traceback" not in err
    assert not (tmp_path / "o").exists()


def test_no_word_of_the_data_reaches_the_trunk(keys: Path, tmp_path: Path) -> None:
    """A client's error messages quote its data; the trunk is told only that there was one."""
    record = {"passage": "p", "question": "SECRET " * 400, "label": True}
    (tmp_path / "0.jsonl").write_text(json.dumps(record) + "\n")
    file = ["--data.task", "jsonl", "--data.train_file", str(tmp_path / "{client_id}.jsonl")]
    finished = start_by_hand(keys, tmp_path / "o", *file)
    assert "SECRET" in finished["client"][1]
    assert finished["client"][0] == 2
    assert "SECRET" not in finished["trunk"][1]
    assert "bad data" in finished["trunk"][1]


def test_sigterm_to_the_launcher_leaves_no_process(keys: Path, tmp_path: Path) -> None:
    mark = f"--run.output_dir={tmp_path / 'o'}"
    command = [sys.executable, LOCAL, *TINY, "--link.keys_dir", str(keys), "--train.max_steps", "5000", mark]
    run = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "o" / "roles" / "client-1" / "metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    run.terminate()
    err = run.communicate(timeout=30)[1]
    assert run.returncode == 75, err
    assert "go on with --run.resume_from_checkpoint latest" in err.splitlines()[-1]
    assert list((tmp_path / "o").glob("checkpoint-*/manifest.json"))
    assert "Traceback" not in err
    assert not subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True, check=False).stdout.split()


@pytest.mark.long
def test_waiting_for_ones_turn_is_no_silence(keys: Path, tmp_path: Path) -> None:
    """Client 1 waits longer than the deadline for client 0's turn to end, and lives."""
    flags = (
        "--train.schedule",
        "serial",
        "--train.sync_every",
        "400",
        "--train.max_steps",
        "401",
        "--data.val_examples",
        "0",
    )
    assert local(tmp_path / "o", keys, *flags, "--link.timeout_s", "4", timeout_s=200).code == 0


def test_a_killed_client_ends_the_run_and_leaves_no_process(keys: Path, tmp_path: Path) -> None:
    mark = f"--run.output_dir={tmp_path / 'o'}"
    command = [sys.executable, LOCAL, *TINY, "--link.keys_dir", str(keys), "--train.max_steps", "5000", mark]
    run = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), stderr=subprocess.PIPE, text=True)
    events = tmp_path / "o" / "roles" / "client-1" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (events.exists() and events.read_text().count('"step"') > 5):
        assert time.monotonic() < deadline, "no step was taken"
        assert run.poll() is None
        time.sleep(0.2)
    ours = subprocess.run(
        ["pgrep", "-f", f"train.py.*{mark}"], capture_output=True, text=True, check=True
    ).stdout.split()
    ranks = {rank_of(int(pid), tmp_path / "o"): pid for pid in ours}
    assert ranks.keys() - {None} == {0, 1, 2}  # None is the process that they are forked from
    victim = ranks[2]
    subprocess.run(["kill", "-9", victim], check=True)
    started = time.monotonic()
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 1
    assert time.monotonic() - started < 30
    assert "client 1" in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("run ended: killed by SIGKILL (client-1); trunk-0: PeerLost: ")
    log = (tmp_path / "o" / "logs" / "trunk-0.log").read_text().splitlines()
    assert "ERROR trunk-0 run ended: PeerLost: " in log[-1]
    log = (tmp_path / "o" / "logs" / "client-1.log").read_text().splitlines()
    assert log[-1].endswith("ERROR client-1 run ended: killed by SIGKILL")
    left = subprocess.run(["pgrep", "-f", mark], capture_output=True, text=True, check=False).stdout.split()
    assert not left


@pytest.mark.parametrize("schedule", ["client_batch", pytest.param("serial", marks=pytest.mark.long)])
def test_killed_and_resumed_equals_uninterrupted(schedule: str, keys: Path, tmp_path: Path) -> None:
    flags = ("--train.max_steps", "12", "--train.save_every", "4", "--train.schedule", schedule)
    whole = local(tmp_path / "whole", keys, *flags).summary
    folder = tmp_path / "cut"
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(keys)]
    run = subprocess.Popen(
        [sys.executable, LOCAL, *TINY, *own, *flags], cwd=ROOT, env=clean_environment(), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 90
    while not (folder / "checkpoint-4" / "manifest.json").exists():
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.02)
    victims = subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["kill", "-9", *victims], check=False)
    run.wait(30)
    again = local(folder, keys, *flags)
    assert again.code == 2
    assert "--run.resume_from_checkpoint latest" in again.err
    resumed = local(folder, keys, *flags, "--run.resume_from_checkpoint", "latest").summary
    assert resumed["losses"] == whole["losses"]
    assert resumed["eval"]["accuracy"] == whole["eval"]["accuracy"]


def test_help_and_config_are_printed(tmp_path: Path) -> None:
    shown = run_command([sys.executable, LOCAL, "--help"], tmp_path)
    assert shown.code == 0
    assert "--train.schedule" in shown.out
    printed = run_command([sys.executable, LOCAL, "--print_config"], tmp_path)
    assert printed.code == 0
    assert "head_blocks: 1" in printed.out
