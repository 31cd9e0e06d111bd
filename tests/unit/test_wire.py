"""What an eavesdropper sees of a whole training run: every byte both ways, searched for what must not be there."""

from __future__ import annotations

import ast
import pickletools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.config import AdapterConfig, Config, DataConfig, LinkConfig, ModelConfig, TrainConfig
from hpc.model.pretrained import load_tokenizer
from hpc.source.resolve import resolve
from tests.loopback import run_split

WINDOW = 16  # bytes; 128 random bits do not match by accident


class Tap:
    """A transport that copies what is sent; one at each end of a link sees everything."""

    def __init__(self, inner: Any, recorded: list[bytes]) -> None:
        self._inner, self._recorded = inner, recorded
        self.name, self.peer, self.short_messages = inner.name, inner.peer, inner.short_messages
        self.recv, self.close = inner.recv, inner.close

    def send(self, buffer: torch.Tensor) -> Any:
        self._recorded.append(buffer.numpy().tobytes())
        return self._inner.send(buffer)


def record(encryption: Any, folder: Path) -> tuple[bytes, dict[str, bytes]]:
    """Bytes on the wires of a run, and the secrets of its first step by name."""
    config = Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=12, val_examples=4),
        train=TrainConfig(clients=1, max_steps=2, per_client_batch_size=3),
        link=LinkConfig(encryption=encryption),
    )
    recorded: list[bytes] = []
    outcome = run_split(config, folder, wrap=lambda transport: Tap(transport, recorded))
    client = outcome.clients[0]
    batch = client.data.train_batch(0)
    with torch.no_grad():
        embedded = client.head.model.get_input_embeddings()(batch.ids_BT)
    fresh = run_head_again(config)
    text = load_tokenizer(resolve(config.model)).decode(batch.ids_BT[0, : batch.lengths[0]])
    assert "Question" in text
    secrets = {
        "smashed": fresh(batch.ids_BT).numpy().tobytes(),
        "embedding": embedded.numpy().tobytes(),
        "token ids, int64": batch.ids_BT[0, :8].numpy().tobytes(),
        "token ids, int32": batch.ids_BT[0, :8].int().numpy().tobytes(),
        "label ids, int64": batch.label_ids_L[:4].numpy().tobytes(),
        "text": text.encode(),
        "losses": b"".join(struct.pack("<d", loss * batch.label_tokens) for loss in outcome.losses),
    }
    return b"".join(recorded), secrets


def run_head_again(config: Config) -> Any:
    """The client head as it was at the first step."""
    from hpc.model.build import ModelBuilder

    head, _ = ModelBuilder.of(config).client_parts()
    return torch.no_grad()(head)


def found(wire: bytes, secret: bytes) -> bool:
    return any(secret[i : i + WINDOW] in wire for i in range(0, len(secret) - WINDOW + 1, 32))


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, bytes]]:
    return record("aes-256-gcm", tmp_path_factory.mktemp("sealed"))


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    """With encryption off the activations are on the wire; ids, labels and text never are, sealed or not."""
    wire, secrets = record("off", tmp_path)
    assert found(wire, secrets["smashed"])
    assert all(found(b"x" * 7 + secret + b"y" * 9, secret) for secret in secrets.values())
    for name in ("token ids, int64", "token ids, int32", "label ids, int64", "text", "losses", "embedding"):
        assert not found(wire, secrets[name]), name


def test_nothing_of_the_client_is_on_the_wire(sealed: tuple[bytes, dict[str, bytes]]) -> None:
    wire, secrets = sealed
    assert len(wire) > 100_000
    for name, secret in secrets.items():
        assert len(secret) >= WINDOW
        assert not found(wire, secret), name


def test_sealed_bytes_look_random(sealed: tuple[bytes, dict[str, bytes]]) -> None:
    """Every byte value about equally often: no float exponents, no zeros of padding."""
    wire, _ = sealed
    counts = torch.bincount(torch.frombuffer(bytearray(wire), dtype=torch.uint8).long(), minlength=256).double()
    share = counts / counts.sum()
    assert float(share.max()) < 1.5 / 256, "the clear prefixes are few"


def test_no_pickle_is_on_the_wire(tmp_path: Path) -> None:
    wire, _ = record("off", tmp_path)
    for start in (i for i in range(len(wire) - 2) if wire[i] == 0x80 and wire[i + 1] in range(2, 6)):
        with pytest.raises(Exception):  # noqa: B017  # any failure to parse will do
            list(pickletools.genops(wire[start : start + 4096]))


def test_no_pickle_in_the_source() -> None:
    package = Path(__file__).resolve().parents[2] / "hpc"
    for path in package.rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "torch.save", "_object(", "_object_list("):
            assert word not in text, f"{path.name}: {word}"


def test_published_weights_are_all_that_is_unpickled_and_only_as_tensors() -> None:
    package = Path(__file__).resolve().parents[2] / "hpc"
    for path in package.rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert not loads or path == package / "model" / "shards" / "torch_bin.py", path
        for call in loads:
            assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords], path
