"""Prompts in the tokenizer's own chat template: the rows are those that the template itself writes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc.config import Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.data.rows import Encoder
from hpc.data.tasks import FORMATS, Example, make_examples
from hpc.errors import DataError
from hpc.source.tiny import tiny_llama_folder
from tests.unit.task_records import RECORDS, write_lines

# As common models write their turns: with marks of their own, with a space before the answer and an end behind it.
TEMPLATES = {
    "marks": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "brackets": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
}


@pytest.fixture(params=TEMPLATES)
def chatty(request: pytest.FixtureRequest) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))
    tokenizer.chat_template = TEMPLATES[request.param]
    return tokenizer


def encoder(tokenizer: Any, source: int = 512) -> Encoder:
    return Encoder(tokenizer=tokenizer, max_source_length=source, max_target_length=48, chat=True)


def first(task: str, **changes: Any) -> Example:
    return make_examples(FORMATS[task], {**copy.deepcopy(RECORDS[task]), **changes}, "here")[0]


@pytest.mark.parametrize("task", ["boolq", "multirc", "record", "huatuo", "xsum"])
def test_a_row_begins_as_the_template_writes_the_whole_talk(chatty: Any, task: str) -> None:
    example = first(task)
    talk = [
        {"role": "user", "content": example.prompt()},
        {"role": "assistant", "content": example.answer.strip()},
    ]
    written = chatty.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    row = encoder(chatty).row(example)
    ids = row.ids[:-1] if example.kind == "text" else row.ids
    assert ids == written[: len(ids)]
    answer = chatty.decode(ids[row.prompt_len :])
    assert answer.strip() == example.answer.strip()
    assert row.ids[-1] == chatty.eos_token_id or example.kind != "text"


def test_truncation_spares_the_question_and_the_template(chatty: Any) -> None:
    example = first("boolq", passage="word " * 200)
    ids = encoder(chatty, 120).prompt(example)
    whole = chatty.apply_chat_template(
        [{"role": "user", "content": example.prompt(0)}], tokenize=False, add_generation_prompt=True
    )
    start, end = whole.split(example.prompt(0))
    text = chatty.decode(ids)
    assert text.startswith(f"{start}word word")
    assert text.endswith(f"{example.after}{end}")
    assert 115 <= len(ids) <= 120


def test_a_tokenizer_without_a_template_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", RECORDS["jsonl"], RECORDS["jsonl"])
    data = DataConfig(task="jsonl", data_dir=str(tmp_path), partition="iid", chat_template=True, val_examples=0)
    config = Config(model=ModelConfig(name_or_path="tiny-llama"), data=data, train=TrainConfig(clients=1))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))
    with pytest.raises(DataError, match=r"--data.chat_template true: .* no chat template; leave it off"):
        load_client_data(config, 0, tokenizer)
    tokenizer.chat_template = TEMPLATES["marks"]
    (row, _) = load_client_data(config, 0, tokenizer).train_rows
    assert tokenizer.decode(row.ids) == "<|user|>\nTwo and two make</s>\n<|assistant|>\nfour<eos>"
