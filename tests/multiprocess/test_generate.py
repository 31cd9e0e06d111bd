"""`launch/generate.py` in real processes: the uncut model's text, and one line for what cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpc.source.tiny import tiny_llama_folder
from tests.runs import LOCAL, ROOT, TINY, Finished, run_command, torchrun

pytestmark = pytest.mark.timeout(240)
GENERATE = str(ROOT / "launch" / "generate.py")
TINY_MODEL = ("--model.name_or_path", "tiny-llama")


def generate(folder: Path, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> Finished:
    own = ["--link.keys_dir", str(folder / "keys"), "--link.timeout_s", "60"]
    return run_command([*launcher, GENERATE, *TINY_MODEL, *own, *arguments], folder)


@pytest.fixture(scope="module")
def plain() -> Any:
    folder = tiny_llama_folder(seed=0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def text(prompt: str, **ways: Any) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = model.generate(ids, max_new_tokens=10, pad_token_id=256, **ways)
        return str(tokenizer.decode(found[0], skip_special_tokens=True))

    return text


def test_the_text_is_the_uncut_models(tmp_path: Path, plain: Any) -> None:
    found = generate(tmp_path, "--prompt", "The ward", "--max_new_tokens", "10")
    assert found.code == 0, found.err
    assert found.out.rstrip("\n") == plain("The ward", do_sample=False).rstrip("\n")
    assert "10 tokens" in found.err


def test_several_clients_under_torchrun(tmp_path: Path, plain: Any) -> None:
    for client, prompt in enumerate(("First", "Second")):
        (tmp_path / f"prompts-{client}.txt").write_text(f"{prompt}\n{prompt} again\n")
    file = str(tmp_path / "prompts-{client_id}.txt")
    found = generate(tmp_path, "--prompt_file", file, "--max_new_tokens", "10", launcher=torchrun(3))
    assert found.code == 0, found.err
    for prompt in ("First", "Second again"):
        assert plain(prompt, do_sample=False) in found.out


@pytest.mark.slow
def test_what_a_run_has_trained_is_heard(tmp_path: Path) -> None:
    """The run's adapter by launch/export.py in plain PEFT says what launch/generate.py says from the run's folder."""
    run, prompt = tmp_path / "run", "The ward"
    keys = ("--link.keys_dir", str(tmp_path / "keys"))
    steps = ("--train.max_steps", "6", "--train.learning_rate", "0.02")
    trained = run_command([sys.executable, LOCAL, *TINY, *keys, *steps, "--run.output_dir", str(run)], run)
    assert trained.code == 0, trained.err
    export = str(ROOT / "launch" / "export.py")
    exported = run_command([sys.executable, export, str(run), "--output_dir", str(tmp_path / "peft")], run)
    assert exported.code == 0, exported.err
    folder = tiny_llama_folder(seed=0)
    base, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    plain = base.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=256)
    model = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    ours = model.generate(input_ids=ids, max_new_tokens=10, do_sample=False, pad_token_id=256)
    assert not torch.equal(plain, ours), "the adapter says nothing"
    found = generate(tmp_path, "--run_folder", str(run), "--prompt", prompt, "--max_new_tokens", "10")
    assert found.code == 0, found.err
    assert found.out.rstrip("\n") == str(tokenizer.decode(ours[0], skip_special_tokens=True)).rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --prompt"),
        (("--prompt", "x" * 2100), "context of 2048 leaves no room"),
        (("--prompt", "a", "--run_folder", "nowhere"), "holds no config.yaml"),
        (("--prompt", "a", "--model.head_blocks", "4"), "leave no trunk"),
    ],
    ids=["no prompt", "too long", "no run", "no trunk"],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    found = generate(tmp_path, *arguments)
    assert found.code == 2, found.err
    assert message in found.err
    assert "Traceback" not in found.err
    assert len(found.err.strip().splitlines()) == 1
