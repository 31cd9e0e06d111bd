"""The publishers' own records, where they are beside the repository: all are read, asked and cut to length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc.config import Config, DataConfig, TrainConfig
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.folders import FOLDERS as PUBLISHED
from hpc.data.rows import Encoder
from hpc.source.tiny import tiny_llama_folder

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDERS = {task: names[0] for task, names in PUBLISHED.items()}
# Task → the published fields that may never be cut, and all choices of a record.
KEPT = {
    "boolq": ["question"],
    "cb": ["hypothesis"],
    "copa": ["premise", "choice1", "choice2"],
    "rte": ["hypothesis"],
    "wic": ["sentence1", "sentence2", "word"],
    "wsc": ["text"],
}
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")


def config(task: Any, clients: int = 1, **data: Any) -> Config:
    settings = {"data_dir": str(DATA), "partition": "iid", "val_examples": 10**6, **data}
    return Config(data=DataConfig(task=task, **settings), train=TrainConfig(clients=clients))


def published(task: str, split: str) -> list[dict[str, Any]]:
    lines = (DATA / FOLDERS[task] / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line.strip()]


def questions_in(task: str, record: dict[str, Any]) -> int:
    if task == "multirc":
        return sum(len(question["answers"]) for question in record["passage"]["questions"])
    return len(record["qas"]) if task == "record" else 1


@pytest.mark.parametrize("task", FOLDERS)
def test_every_published_record_is_asked(task: str) -> None:
    for split, examples in (("train", training_examples), ("val", held_out_examples)):
        asked = examples(config(task), 0)
        assert len(asked) == sum(questions_in(task, record) for record in published(task, split)) > 0
        assert all(example.right and example.answer.strip() for example in asked)


@pytest.mark.parametrize("task", FOLDERS)
def test_prompts_of_real_records_fit_and_keep_their_question(task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))
    limit = 700  # bytes: short enough to cut most passages and articles
    encoder = Encoder(tokenizer=tokenizer, max_source_length=limit, max_target_length=100)
    examples, records = held_out_examples(config(task), 0)[:25], published(task, "val")
    cut = 0
    for number, example in enumerate(examples):
        ids = encoder.prompt(example)
        text = tokenizer.decode(ids)
        assert len(ids) <= limit
        assert text.startswith(example.before)
        assert text.endswith(example.after)
        assert all(encoder.answer(example, choice) for choice in example.choices)
        cut += text != example.prompt()
        for name in KEPT.get(task, []):
            assert records[number][name].strip().rstrip("?") in text
        if task == "huatuo":  # patients ask at the end
            assert text[-10:] == records[number]["question"].strip()[-10:]
    assert cut > 0 or task in ("cb", "copa", "rte", "wic", "wsc", "boolq", "huatuo")


@pytest.mark.parametrize("partition", ["iid", "group"])
def test_no_passage_of_multirc_is_shared_if_dealt_by_group(partition: str) -> None:
    whole = training_examples(config("multirc"), 0)
    shares = [training_examples(config("multirc", clients=2, partition=partition), k) for k in range(2)]
    assert sum(map(len, shares)) == len(whole)
    homes = [{example.passage for example in share} for share in shares]
    shared = sum(map(len, homes)) - len(set().union(*homes))
    assert (shared == 0) == (partition == "group")
