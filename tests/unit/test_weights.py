"""Each part reads its own tensors, equal to the model's, from every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from hpc.model.shards import extent
from hpc.model.shards.extent import Extent, runs
from hpc.source.cut import PartKind
from tests.unit import checkpoints
from tests.unit.checkpoints import FORMATS, read_part, source_of

KINDS: tuple[PartKind, ...] = ("head", "trunk", "tail")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return checkpoints.small_llama()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("HPC_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["stored dtype", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
def test_each_part_reads_its_own_tensors(
    model: LlamaForCausalLM, tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    FORMATS[form](model, tmp_path)
    plain = model.state_dict()
    seen: list[str] = []
    for kind in KINDS:
        found, source = read_part(tmp_path, kind, dtype)
        for key, tensor in found.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, plain[key].to(dtype)), key
        assert source.keys_read == found.keys()
        assert source.bytes_read == sum(plain[key].nbytes for key in found)
        seen += found
    assert sorted(seen) == sorted(plain)


@pytest.mark.parametrize("form", ["sharded safetensors", "sharded bin"])
@pytest.mark.parametrize("kind", KINDS)
def test_shards_that_hold_nothing_owned_need_not_be_there(
    model: LlamaForCausalLM, tmp_path: Path, form: str, kind: PartKind
) -> None:
    FORMATS[form](model, tmp_path)
    index = json.loads(next(tmp_path.glob("*.index.json")).read_text())["weight_map"]
    found, source = read_part(tmp_path, kind, torch.float32)
    needed = {index[key] for key in found}
    assert source.files_opened == needed < set(index.values())
    for shard in set(index.values()) - needed:
        (tmp_path / shard).unlink()
    again, _ = read_part(tmp_path, kind, torch.float32)
    assert again.keys() == found.keys()


def test_safetensors_come_before_bin(model: LlamaForCausalLM, tmp_path: Path) -> None:
    checkpoints.write_safetensors(model, tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not opened")
    assert read_part(tmp_path, "head", torch.float32)[1].files_opened == {"model.safetensors"}


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, torch.float32])
def test_pieces_of_any_size_convert_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stored: torch.dtype, asked: torch.dtype
) -> None:
    monkeypatch.setattr(extent, "PIECE_BYTES", 1000)
    tensors = {"a": torch.randn(37, 29).to(stored), "count": torch.arange(900), "none": torch.empty(0, 4, dtype=stored)}
    tensors["one"] = torch.tensor(3.0, dtype=stored)
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "other.bin")
    (tmp_path / "bin").mkdir()
    (tmp_path / "other.bin").rename(tmp_path / "bin" / "pytorch_model.bin")
    for folder in (tmp_path, tmp_path / "bin"):
        found = source_of(folder).read(list(tensors), dtype=asked)
        for key, tensor in tensors.items():
            expected = tensor.to(asked) if tensor.is_floating_point() else tensor
            assert found[key].dtype == expected.dtype
            assert torch.equal(found[key], expected), key


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000)}, tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    source = source_of(tmp_path)
    source.read(["a"], dtype=torch.float32)["a"].add_(1)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert float(source.read(["a"], dtype=torch.float32)["a"].sum()) == 5000


def test_only_stretches_with_owned_tensors_are_mapped() -> None:
    def at(start: int, elements: int) -> Extent:
        return Extent(dtype=torch.float32, shape=(elements,), stride=(1,), start=start)

    far = 10 * extent.GAP_BYTES
    assert runs([at(far, 10), at(0, 5), at(100, 3)]) == [range(112), range(far, far + 40)]
    assert runs([]) == []


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_bin_tensors_may_be_views_of_each_other(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(20, 30)
    tensors = {
        "base": base,
        "rows": base[3:7],
        "turned": base.t()[2:],
        "half": base.half(),
        "p": torch.nn.Parameter(base),
    }
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    for dtype in (torch.float32, torch.float16):
        found = source_of(tmp_path).read(list(tensors), dtype=dtype)
        for key, tensor in tensors.items():
            assert torch.equal(found[key], tensor.detach().to(dtype)), key
            assert found[key].is_contiguous()
            assert not found[key].requires_grad
        found["rows"].zero_()
        assert torch.equal(found["base"], base.to(dtype)), "they must not learn as one"
