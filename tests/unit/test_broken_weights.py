"""What can be wrong with a model's files: each is refused, and named with what to do."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from hpc.errors import ModelError
from tests.unit import checkpoints
from tests.unit.checkpoints import FORMATS, read_part, refused, source_of

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return checkpoints.small_llama()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HPC_CACHE", str(tmp_path_factory.mktemp("cache")))


def first_shard(folder: Path) -> Path:
    index = json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]
    return folder / str(index["model.embed_tokens.weight"])


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_a_missing_shard_is_named(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    FORMATS[form](model, tmp_path)
    shard = first_shard(tmp_path)
    shard.unlink()
    refused(tmp_path, f"lacks the shard {shard.name}", "fetch that file")


@pytest.mark.parametrize("left", [0.9, 0.5, 0.001, 0])
@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin", "gguf"])
def test_a_truncated_shard_is_named(model: LlamaForCausalLM, tmp_path: Path, form: str, left: float) -> None:
    FORMATS[form](model, tmp_path)
    if form == "gguf":
        model.config.save_pretrained(tmp_path)
    shard = tmp_path / "small.gguf" if form == "gguf" else first_shard(tmp_path)
    data = shard.read_bytes()
    shard.write_bytes(data[: int(len(data) * left)])
    refused(tmp_path, shard.name, "GGUF" if form == "gguf" and left < 0.001 else "fetch it again")


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
def test_an_index_that_names_what_a_shard_lacks(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    FORMATS[form](model, tmp_path)
    shard = first_shard(tmp_path)
    tensors = load_file(shard) if shard.suffix == ".safetensors" else torch.load(shard, weights_only=True)
    del tensors["model.embed_tokens.weight"]
    (save_file if shard.suffix == ".safetensors" else torch.save)(tensors, shard)
    refused(tmp_path, f"{shard.name} lacks model.embed_tokens.weight", "fetch them all again")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": 3}', "[]"])
def test_an_index_that_is_none_is_named(model: LlamaForCausalLM, tmp_path: Path, text: str) -> None:
    checkpoints.write_sharded_safetensors(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, "model.safetensors.index.json does not map keys to shards")


def test_a_folder_without_weights_lists_what_is_read(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    refused(tmp_path, "model.safetensors", "pytorch_model.bin", str(tmp_path))


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "sharded bin", "gguf"])
def test_opened_shards_are_verified_against_the_list(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    FORMATS[form](model, tmp_path)
    opened = read_part(tmp_path, "head", torch.float32)[1].files_opened
    files = [path for path in tmp_path.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf")]
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    for wrong in sums:
        stated = sums | {wrong: "0" * 64}
        (tmp_path / "SHA256SUMS").write_text("".join(f"{stated[name]}  {name}\n" for name in stated))
        if wrong in opened:
            refused(tmp_path, wrong, f"{'0' * 64} expected", f"{sums[wrong]} found")
        else:
            read_part(tmp_path, "head", torch.float32)


def test_the_list_is_sha256sums_own(model: LlamaForCausalLM, tmp_path: Path) -> None:
    checkpoints.write_sharded_safetensors(model, tmp_path)
    command = "sha256sum --binary *.safetensors ./*.json > SHA256SUMS"
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    read_part(tmp_path, "head", torch.float32)
    (tmp_path / "SHA256SUMS").write_text("deadbeef  model.safetensors\n")
    refused(tmp_path, "SHA256SUMS line 1", "deadbeef")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_dtype_that_means_nothing_alone_is_named(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    state = dict(model.state_dict()) | {EMBEDDING: model.state_dict()[EMBEDDING].to(torch.float8_e4m3fn)}
    write_state(state, model, tmp_path, form)
    refused(tmp_path, EMBEDDING, "8_e4m3" if form == "bin" else "F8_E4M3", "without its scales")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_quantised_integers_are_named(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    state = dict(model.state_dict()) | {EMBEDDING: model.state_dict()[EMBEDDING].to(torch.int8)}
    write_state(state, model, tmp_path, form)
    refused(tmp_path, EMBEDDING, "torch.int8", "quantised")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_foreign_shape_is_named(model: LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    state = dict(model.state_dict()) | {EMBEDDING: torch.zeros(7, 64)}
    write_state(state, model, tmp_path, form)
    refused(tmp_path, EMBEDDING, "(7, 64)", "(320, 64)")


def write_state(state: dict[str, torch.Tensor], model: LlamaForCausalLM, folder: Path, form: str) -> None:
    model.config.save_pretrained(folder)
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors")


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("code from the file ran",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_code_in_a_bin_file_is_never_run(model: LlamaForCausalLM, tmp_path: Path, zipped: bool) -> None:
    model.config.save_pretrained(tmp_path)
    torch.save({EMBEDDING: Harmful()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, "pytorch_model.bin holds more than tensors", "could run code")


def test_a_bin_file_must_map_names_to_tensors(model: LlamaForCausalLM, tmp_path: Path) -> None:
    model.config.save_pretrained(tmp_path)
    torch.save([torch.ones(3)], tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin holds a list")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"nonsense", "does not parse"),
        (b"[1]", "does not parse"),
        (b'{"a": {"dtype": "F32"}}', "does not parse"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "negative size"),
        (
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
            "0 bytes of values, where its header says 4",
        ),
    ],
)
def test_a_broken_safetensors_header_is_named(tmp_path: Path, header: bytes, reason: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole safetensors file") as caught:
        source_of(tmp_path)
    assert reason in str(caught.value)


def test_an_extent_that_does_not_fit_its_shape_is_named(tmp_path: Path) -> None:
    header = b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"a of shape \(3,\) does not have 4 bytes"):
        source_of(tmp_path).read(["a"], dtype=torch.float32)
