"""What launch/generate.py is asked for: refused before any work starts, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc.ask import encode
from hpc.errors import BadInput, ConfigError, DataError
from hpc.source.tiny import tiny_llama_folder
from hpc.wishes import Wishes, prompts_of


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"max_new_tokens": 0}, "--max_new_tokens is 0"),
        ({"num_beams": 0}, "--num_beams is 0"),
        ({"do_sample": True, "temperature": 0.0}, "--temperature is 0.0; it must be above 0"),
        ({"do_sample": True, "top_p": 1.5}, "--top_p is 1.5"),
        ({"temperature": 0.7}, "need --do_sample true"),
        ({"client": -1}, "--client is -1"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Wishes(**wishes)


def test_sampling_is_only_told_where_it_is_wanted() -> None:
    assert Wishes().arguments() == {"max_new_tokens": 64, "do_sample": False, "num_beams": 1}
    assert Wishes(do_sample=True, top_k=5, stop=["\n"]).arguments()["top_k"] == 5


def test_a_line_of_a_file_is_a_prompt_and_each_client_may_have_its_own(tmp_path: Path) -> None:
    (tmp_path / "prompts-1.txt").write_text("one\n\n two\n")
    wishes = Wishes(prompt_file=str(tmp_path / "prompts-{client_id}.txt"))
    assert prompts_of(None, wishes, 1) == ["one", " two"]
    with pytest.raises(DataError, match=r"prompts-0\.txt cannot be read"):
        prompts_of(None, wishes, 0)


@pytest.mark.parametrize(
    ("given", "file", "message"),
    [(None, None, "either --prompt"), (["a"], "b.txt", "either --prompt"), (["a", " "], None, "a prompt is empty")],
)
def test_prompts_come_from_one_place_and_are_not_empty(given: Any, file: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prompts_of(given, Wishes(prompt_file=file), 0)


def test_a_model_without_a_chat_template_or_padding_says_so() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))
    with pytest.raises(ConfigError, match="no chat template"):
        encode(tokenizer, ["a"], chat=True)
    tokenizer.pad_token = tokenizer.eos_token = None
    assert encode(tokenizer, ["a b"])[0].shape == (1, 3)  # a token for each byte
    with pytest.raises(ConfigError, match="no token to pad with"):
        encode(tokenizer, ["a", "b c"])
