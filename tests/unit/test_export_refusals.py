"""What cannot be exported is refused with the reason, and nothing is written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hpc.config import ModelConfig
from hpc.errors import BadInput, CheckpointError, ConfigError, ProtocolError
from hpc.export.layout import Layout
from hpc.export.wire import receive_trunk_adapter
from hpc.link.frame import Header
from hpc.link.kinds import Kind
from hpc.trunk_link import TrunkLink
from tests.export_case import ADAPTERS, export_to, finished_runs, tiny
from tests.loopback import channel_pair, run_split


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return finished_runs(tmp_path_factory.mktemp)


def frames(names: Any, tensors: Any) -> list[tuple[Header, torch.Tensor]]:
    text = names if isinstance(names, bytes) else json.dumps(names).encode()
    first = Header(kind=Kind.TRUNK_ADAPTER), torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return [first, *((Header(kind=Kind.TRUNK_ADAPTER, micro=i), tensor) for i, tensor in enumerate(tensors))]


PREFIX = torch.zeros(5, 2 * 2 * 32)  # two blocks' keys and values


@pytest.mark.parametrize(
    ("names", "tensors", "words"),
    [
        (["prefix.trunk"], [PREFIX[:, 1:]], r"prefix.trunk has shape \(5, 127\); due: \(5, 128\)"),
        (["prefix.trunk"], [PREFIX.half()], "float16"),
        ([], [], "1 of 1 tensors are missing, first prefix.trunk"),
        (["prefix.trunk", "prefix.head"], [], "do not belong here, first prefix.head"),
        (["prefix.trunk", "prefix.trunk"], [], "different names"),
        ({"prefix.trunk": 1}, [], "list"),
        (b"\xff", [], "JSON"),
    ],
)
def test_a_trunk_that_sends_something_else_is_refused(names: Any, tensors: Any, words: str) -> None:
    layout = Layout.of(ModelConfig(name_or_path="tiny-llama"), ADAPTERS["p_tuning_v2"])
    client_end, server_end = channel_pair("off")
    for header, tensor in frames(names, tensors):
        server_end.send(header, tensor)
    link = TrunkLink(client_end, client_id=0, device=torch.device("cpu"), reads_ahead=False)
    with pytest.raises(ProtocolError, match=words):
        receive_trunk_adapter(link, layout)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("full", {}, "add --merge"),
        ("some prefixes", {}, "only some blocks a prefix"),
        ("p_tuning_v2", {"merge": True}, "--merge cannot"),
        ("lora", {"dtype": "bfloat16"}, "is for --merge"),
        ("lora", {"client": 2}, "its clients are 0 to 1"),
        ("lora", {"checkpoint": "checkpoint-9"}, "holds checkpoint-2"),
        ("lora", {"checkpoint": "latest"}, "holds checkpoint-2"),
    ],
)
def test_what_cannot_be(name: str, options: dict[str, Any], words: str, runs: Any, tmp_path: Path) -> None:
    _, _, run = runs(name)
    with pytest.raises(BadInput, match=words):
        export_to(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_not_empty(runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        export_to(run, tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run's folder"):
        export_to(tmp_path / "no", tmp_path / "out")


def copied(run: Path, to: Path) -> Path:
    """The run without its checkpoint."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoint-*", "roles"))
    return to


def test_an_unfinished_run_names_its_checkpoints(runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    shutil.copytree(run, tmp_path / "a", ignore=shutil.ignore_patterns("adapter"))
    with pytest.raises(CheckpointError, match="has not ended; give --checkpoint with one of checkpoint-2"):
        export_to(tmp_path / "a", tmp_path / "out")
    (tmp_path / "a" / "checkpoint-2" / "trunk.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no trunk\.safetensors"):
        export_to(tmp_path / "a", tmp_path / "out", checkpoint="checkpoint-2")


def test_an_adapter_of_another_cut(runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    for key in ("head_blocks", "init_seed"):
        other = copied(run, tmp_path / key)
        text = (other / "config.yaml").read_text()
        assert f"{key}: " in text
        (other / "config.yaml").write_text(re.sub(rf"{key}: \d", f"{key}: 2", text))
        with pytest.raises(CheckpointError, match=rf"model\.{key}: \d, here 2"):
            export_to(other, tmp_path / "out")


@pytest.mark.parametrize("name", ["export.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_folder_that_is_not_whole(name: str, how: str, runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    path = copied(run, tmp_path / "a") / "adapter" / "client-0" / name
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=re.escape(name)):
        export_to(tmp_path / "a", tmp_path / "out")


def test_tensors_of_another_adapter(runs: Any, tmp_path: Path) -> None:
    _, _, run = runs("lora")
    path = copied(run, tmp_path / "a") / "adapter" / "client-0" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    for changed in (
        {**tensors, "strange": PREFIX},
        {**tensors, first: PREFIX},
        {k: tensors[k] for k in tensors if k != first},
    ):
        save_file(changed, path)
        with pytest.raises(CheckpointError, match=f"{re.escape(first)}|strange"):
            export_to(tmp_path / "a", tmp_path / "out")


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpc.export.save.write_folder", full)
    assert len(run_split(tiny("lora"), tmp_path).losses) == 2
    assert [r.message for r in caplog.records if "client-0 was not written" in r.message and "No space" in r.message]


def test_a_full_disc_does_not_end_a_run_that_has_come_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """safetensors has an error of its own for it."""

    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hpc.export.folder.save_file", full)
    config = tiny("lora")
    run_split(config, tmp_path)
    assert not (tmp_path / "adapter" / "client-0").exists()
    assert "was not written: I/O error: No space left" in caplog.text
