"""Whole tasks dealt to clients: nothing lost or doubled, no passage of MultiRC shared, no question scored by half."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from hpc.config import Config, DataConfig, TemplateConfig, TrainConfig
from hpc.data.dataset import load_client_data
from hpc.data.examples import held_out_examples, training_examples
from hpc.data.tasks import Example
from hpc.errors import DataError
from hpc.source.tiny import tiny_llama_folder
from tests.unit.task_records import RECORDS, write_lines

ShareOf = Callable[[Config, int], list[Example]]
CLIENTS = 3


def passages(count: int) -> list[dict[str, Any]]:
    """MultiRC records of one to three questions with one to four answers."""
    records = []
    for number in range(count):
        record = copy.deepcopy(RECORDS["multirc"])
        record["idx"] = number
        record["passage"]["text"] = f"Passage {number} of many."
        record["passage"]["questions"] = [
            {
                "question": f"Question {q}?",
                "idx": q,
                "answers": [{"text": f"{a}", "label": (a + q) % 2} for a in range(1 + (number + q) % 4)],
            }
            for q in range(1 + number % 3)
        ]
        records.append(record)
    return records


def numbered(task: str, count: int) -> list[dict[str, Any]]:
    """Records of one question each, all different."""
    if task in ("boolq", "record"):
        records = [copy.deepcopy(RECORDS[task]) for _ in range(count)]
        for number, record in enumerate(records):
            if task == "boolq":
                record.update(passage=f"Passage {number}.", label=number % 2 == 0)
            else:
                record["passage"]["text"] += f" Passage {number}."
        return records
    return [{"prompt": f"prompt {number}", "answer": "x", "group": number // 4} for number in range(count)]


def dealt(folder: Path, task: Any, records: list[dict[str, Any]], **data: Any) -> Config:
    write_lines(folder / "train.jsonl", *records)
    write_lines(folder / "val.jsonl", *records)
    settings = {"alpha": 5.0, "val_examples": 1000, "partition": "iid", **data}
    return Config(data=DataConfig(task=task, data_dir=str(folder), **settings), train=TrainConfig(clients=CLIENTS))


def shares_of(config: Config, share_of: ShareOf = training_examples) -> list[list[Example]]:
    return [share_of(config, client) for client in range(CLIENTS)]


def everything(folder: Path, task: Any) -> list[str]:
    whole = Config(data=DataConfig(task=task, data_dir=str(folder), partition="iid"), train=TrainConfig(clients=1))
    return sorted(example.prompt() for example in training_examples(whole, 0))


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "size", "group"])
@pytest.mark.parametrize("task", ["boolq", "multirc", "record", "jsonl"])
def test_nothing_is_lost_or_doubled(tmp_path: Path, task: str, partition: str) -> None:
    records = passages(30) if task == "multirc" else numbered(task, 48)
    config = dealt(tmp_path, task, records, partition=partition)
    if partition == "dirichlet" and task in ("record", "jsonl"):
        with pytest.raises(DataError, match=rf"dirichlet skews labels, and {task} has none; .*size"):
            training_examples(config, 0)
        return
    if partition == "group" and task == "boolq":
        with pytest.raises(DataError, match=r"48 of 48 examples of boolq have no group; .*template.group_field"):
            training_examples(config, 0)
        return
    shares = shares_of(config)
    assert all(shares)
    assert sorted(example.prompt() for share in shares for example in share) == everything(tmp_path, task)


@pytest.mark.parametrize("task", ["multirc", "record", "jsonl"])
@pytest.mark.parametrize("share_of", [training_examples, held_out_examples])
def test_a_group_is_never_split(tmp_path: Path, task: str, share_of: ShareOf) -> None:
    records = passages(30) if task == "multirc" else numbered(task, 48)
    shares = shares_of(dealt(tmp_path, task, records, partition="group"), share_of)
    homes = [{example.group for example in share} for share in shares]
    assert sum(map(len, homes)) == len(set().union(*homes)) > CLIENTS
    assert None not in homes[0]


def test_a_field_named_by_the_configuration_groups_too(tmp_path: Path) -> None:
    records = [{**record, "ward": f"w{number % 5}"} for number, record in enumerate(numbered("boolq", 40))]
    config = dealt(tmp_path, "boolq", records, partition="group", template=TemplateConfig(group_field="ward"))
    homes = [{example.group for example in share} for share in shares_of(config)]
    assert sorted(group for home in homes for group in home if group) == ["w0", "w1", "w2", "w3", "w4"]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "size", "group"])
@pytest.mark.parametrize("limit", [5, 9, 1000])
def test_a_held_out_question_is_there_with_all_its_answers(tmp_path: Path, partition: str, limit: int) -> None:
    config = dealt(tmp_path, "multirc", passages(30), partition=partition, val_examples=limit)
    answers: dict[str | None, int] = {}
    whole = Config(data=config.data, train=TrainConfig(clients=1))
    for example in training_examples(whole, 0):
        answers[example.question] = answers.get(example.question, 0) + 1
    shares = shares_of(config, held_out_examples)
    for share in shares:
        questions = [example.question for example in share]
        assert 0 < len(share) <= limit
        assert all(questions.count(question) == answers[question] for question in questions)
    asked = [{example.question for example in share} for share in shares]
    assert len(set().union(*asked)) == sum(map(len, asked))
    assert limit < 1000 or sum(map(len, shares)) == sum(answers.values())


def test_a_limit_below_one_question_is_refused(tmp_path: Path) -> None:
    record = passages(4)[3]  # its first question has four answers
    config = dealt(tmp_path, "multirc", [record], partition="iid", val_examples=2)
    with pytest.raises(DataError, match=r"--data.val_examples 2 is less than the answers of one question"):
        held_out_examples(Config(data=config.data, train=TrainConfig(clients=1)), 0)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_source_length": 200}, r":3: a question takes \d+ tokens"),
        ({"max_source_length": 900, "max_target_length": 3}, r":\d: the answer ' Yes' has 4 tokens"),
    ],
)
def test_what_is_too_long_is_named_with_its_task_file_and_line(
    tmp_path: Path, limits: dict[str, int], words: str
) -> None:
    records = numbered("boolq", 4)
    records[2]["question"] = "is this " * 40
    whole = replace(dealt(tmp_path, "boolq", records, **limits), train=TrainConfig(clients=1))
    with pytest.raises(DataError, match=rf"^boolq, .*\.jsonl{words}"):
        load_client_data(whole, 0, AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0)))


def test_more_candidates_than_a_link_takes_are_refused(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORDS["record"])
    names = [f"N{number}" for number in range(65)]
    starts = [len(" ".join([record["passage"]["text"], *names[:place]])) + 1 for place in range(65)]
    record["passage"]["text"] = " ".join([record["passage"]["text"], *names])
    record["passage"]["entities"] += [
        {"start": start, "end": start + len(name) - 1} for start, name in zip(starts, names, strict=True)
    ]
    whole = replace(dealt(tmp_path, "record", [record]), train=TrainConfig(clients=1))
    with pytest.raises(DataError, match=r"^record, .*val.jsonl:1, query 0: .* 68 candidates, more than the 64"):
        load_client_data(whole, 0, AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0)))


def test_a_broken_record_is_named_with_its_task_file_and_line(tmp_path: Path) -> None:
    records = [*numbered("boolq", 2), {"passage": "x", "label": True}]
    with pytest.raises(DataError, match=r"^boolq, .*/train.jsonl:3: no field 'question'; the record has 'passage'"):
        training_examples(dealt(tmp_path, "boolq", records), 0)


def test_fewer_groups_than_clients_name_the_client(tmp_path: Path) -> None:
    config = dealt(tmp_path, "multirc", passages(2), partition="group")
    with pytest.raises(DataError, match=r"client 2 is left without examples.*only 2 groups"):
        training_examples(config, 0)


@pytest.mark.parametrize("partition", ["iid", "size", "files"])
def test_at_most_so_many_of_each_share_are_trained_on(tmp_path: Path, partition: str) -> None:
    for client in range(CLIENTS):
        config = dealt(tmp_path / str(client), "jsonl", numbered("jsonl", 48))
    config = replace(config, data=replace(config.data, data_dir=str(tmp_path / "{client_id}"), partition=partition))
    capped = replace(config, data=replace(config.data, max_train_examples=7))
    another = replace(capped, train=replace(config.train, seed=config.train.seed + 1))
    for examples, drawn in zip(shares_of(config), shares_of(capped), strict=True):
        whole, share = [example.where for example in examples], [example.where for example in drawn]
        assert len(whole) > len(share) == 7
        assert share == [where for where in whole if where in share]
        assert share not in (whole[:7], whole[-7:])
    if partition == "files":  # where the shares are the same whatever the seed
        assert shares_of(another) != shares_of(capped)
