"""What a role costs when the model has Llama-2-7B's true shape: memory, bytes read, files opened.

The checkpoint is a random one, sharded as the published one is. Blocks that no part of these tests owns are holes in
the files: they have their size and place, and cost no disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden"
CONFIG, INDEX = GOLDEN / "llama-2-7b.config.json", GOLDEN / "llama-2-7b.index.json"
MIB, GIB = 2**20, 2**30
WRITTEN_BLOCKS = (0, 1, 2, 31)
NAMES = {"F16": torch.float16, "BF16": torch.bfloat16}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not INDEX.is_file(), reason="llama-2-7b.index.json is not in the folder beside the repository"),
]

# In a process of its own, as a role is: the peak of this one is another matter.
ROLE = """
import json, sys
import torch, transformers, peft
from transformers import LlamaForCausalLM
from hpc.config import Config, ModelConfig
from hpc.model.build import ModelBuilder

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder, parts, head, tail = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
imported = peak()
model = ModelConfig(name_or_path=folder, dtype="bfloat16", head_blocks=head, tail_blocks=tail)
builder = ModelBuilder.of(Config(model=model))
built = builder.client_parts() if parts == "client" else (builder.part("trunk"),)
frozen = {part.whole_name(n): p for part in built for n, p in part.named_parameters() if not p.requires_grad}
for parameter in frozen.values():  # a page that is only mapped is resident once it is used
    parameter.view(torch.uint8).flatten()[::4096].sum()
loaded = peak()
sums = {name: float(p[-1].double().sum()) for name, p in frozen.items()}
print(json.dumps({
    "imported": imported, "peak": loaded, "owned": sum(p.nbytes for p in frozen.values()), "sums": sums,
    "dtypes": sorted({str(p.dtype) for p in frozen.values()}), "bytes_read": builder.source.bytes_read,
    "files_opened": sorted(builder.source.files_opened), "keys_read": sorted(builder.source.keys_read),
}))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the published files: the parameters, and the rotary tables that were still stored then."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(CONFIG))
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return found | {f"model.layers.{block}.self_attn.rotary_emb.inv_freq": (64,) for block in range(32)}


def is_written(key: str) -> bool:
    block = key.removeprefix("model.layers.").partition(".")[0]
    return not block.isdigit() or int(block) in WRITTEN_BLOCKS


def write_shard(path: Path, keys: list[str], sizes: dict[str, tuple[int, ...]], dtype: str, block: bytes) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in keys:
        start, end = end, end + 2 * math.prod(sizes[key])
        header[key] = {"dtype": dtype, "shape": sizes[key], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in filter(is_written, keys):
            first, last = (8 + len(text) + place for place in header[key]["data_offsets"])
            file.seek(first)
            while (left := last - file.tell()) > 0:
                file.write(block[:left])
        file.truncate(8 + len(text) + end)


@pytest.fixture(scope="module", params=list(NAMES))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(f"llama-2-7b-{request.param}")
    if shutil.disk_usage(folder).free < 4 * GIB:
        pytest.skip(f"less than 4 GiB free in {folder}")
    try:
        shutil.copy(CONFIG, folder / "config.json")
        shutil.copy(INDEX, folder / "model.safetensors.index.json")
        index, sizes = json.loads(INDEX.read_text()), shapes()
        assert sizes.keys() == index["weight_map"].keys()
        assert sum(2 * math.prod(shape) for shape in sizes.values()) == index["metadata"]["total_size"]
        values = torch.randn(16 * MIB, generator=torch.Generator().manual_seed(0)).to(NAMES[request.param])
        block = values.view(torch.uint8).numpy().tobytes()
        for shard in sorted(set(index["weight_map"].values())):
            keys = sorted(key for key, file in index["weight_map"].items() if file == shard)
            write_shard(folder / shard, keys, sizes, request.param, block)
        yield folder
    finally:
        shutil.rmtree(folder)


def role(folder: Path, parts: str, head_blocks: int, tail_blocks: int) -> dict[str, Any]:
    command = [sys.executable, "-c", ROLE, str(folder), parts, str(head_blocks), str(tail_blocks)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print({key: value / MIB for key, value in told.items() if isinstance(value, int)})
    return told


def expected_sum(folder: Path, key: str) -> float:
    """The last row of a tensor in bfloat16, read by the safetensors library."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][key], framework="pt") as shard:
        row = shard.get_slice(key)[-1:]
    return float(row.to(torch.bfloat16).double().sum())


def assert_values(folder: Path, told: dict[str, Any]) -> None:
    assert told["dtypes"] == ["torch.bfloat16"]
    for name, found in told["sums"].items():
        key = name.removeprefix("model.").replace(".base_layer.", ".")
        assert found == expected_sum(folder, key), key


def test_a_client_holds_under_two_gib(checkpoint: Path) -> None:
    told = role(checkpoint, "client", 1, 1)
    assert told["peak"] < 2 * GIB
    assert told["peak"] < told["imported"] + told["owned"] + 64 * MIB
    assert told["bytes_read"] == pytest.approx(told["owned"], rel=0.01)
    assert told["owned"] > 1.2 * GIB
    assert {key.split(".")[2] for key in told["keys_read"] if "layers" in key} == {"0", "31"}
    assert_values(checkpoint, told)


def test_a_trunk_of_some_blocks_costs_what_it_owns(checkpoint: Path) -> None:
    told = role(checkpoint, "trunk", 1, 29)
    assert told["owned"] > 0.75 * GIB
    assert told["peak"] < told["imported"] + told["owned"] + 64 * MIB
    assert told["bytes_read"] == pytest.approx(told["owned"], rel=0.01)
    # The published index keeps blocks 1 and 2 in the first shard: the second one is not opened.
    assert told["files_opened"] == ["model-00001-of-00002.safetensors"]
    assert_values(checkpoint, told)
