"""Tasks with candidates, questions and texts, trained and evaluated through the cut model as through the whole one."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hpc.config import Config, DataConfig, ModelConfig, TrainConfig
from hpc.data.dataset import ClientData, EvalItem, load_client_data, score_eval
from hpc.data.examples import held_out_examples
from hpc.matches import count_matches, matches_and_texts
from hpc.model.build import ModelBuilder
from hpc.model.continued import ContinuedLM, WholeChain
from hpc.model.pretrained import load_tokenizer
from hpc.report.events import read_events
from tests.loopback import run_centralised, run_split
from tests.unit.task_records import RECORDS, write_lines

TASKS = ["multirc", "record", "xsum", "huatuo"]


def records(task: str, count: int) -> list[dict[str, Any]]:
    """The invented record again and again, each a little different."""
    found = [copy.deepcopy(RECORDS[task]) for _ in range(count)]
    for number, record in enumerate(found):
        if task in ("multirc", "record"):
            record["passage"]["text"] += f" No. {number}."
        else:
            name = {"xsum": "document", "huatuo": "question"}[task]
            record[name] += f" {number}."
        if task == "record":  # not all have as many candidates
            record["passage"]["entities"] += [{"start": 13, "end": 18}] * (number % 2)
    return found


def config_of(folder: Path, task: Any, **train: Any) -> Config:
    write_lines(folder / "train.jsonl", *records(task, 8))
    write_lines(folder / "val.jsonl", *records(task, 6))
    data = DataConfig(
        task=task,
        data_dir=str(folder),
        partition="iid",
        max_source_length=160,
        max_target_length=24,
        val_examples=5,
        evaluate_by="generation" if task in ("record", "xsum") else "likelihood",
        save_predictions=True,
    )
    settings = {"clients": 2, "max_steps": 2, "per_client_batch_size": 2, "schedule": "client_batch", **train}
    return Config(model=ModelConfig(name_or_path="tiny-llama"), data=data, train=TrainConfig(**settings))


def evaluations(folder: Path) -> dict[tuple[int, int], tuple[int | None, int, float]]:
    """(step, client) → right answers, examples, loss."""
    found = {}
    for path in sorted((folder / "roles").glob("c*/metrics.jsonl")):
        for event in read_events(path):
            if event["event"] == "eval":
                client = event.get("client_id")
                client = int(path.parent.name.rpartition("-")[2]) if client is None else client
                found[event["step"], client] = (event["correct"], event["total"], event["loss_sum"])
    return found


def predictions(folder: Path) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """(step, client) → the lines of its file, which nobody else can read."""
    found = {}
    for path in (folder / "roles").glob("*/predictions-*.jsonl"):
        assert path.stat().st_mode & 0o777 == 0o600
        _, step, _, client = path.stem.split("-")
        found[int(step), int(client)] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_a_split_run_learns_and_scores_as_the_whole_model(tmp_path: Path, task: str) -> None:
    split = run_split(config_of(tmp_path / "data", task), tmp_path / "split")
    whole = run_centralised(config_of(tmp_path / "data", task, schedule="centralised"), tmp_path / "whole")
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    one, other = evaluations(tmp_path / "split"), evaluations(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert len(one) == 4
    for key, (correct, total, loss_sum) in one.items():
        assert (correct, total) == other[key][:2]
        assert loss_sum == pytest.approx(other[key][2], rel=1e-5)
        assert (correct is None) == (task in ("xsum", "huatuo"))
    predicted = predictions(tmp_path / "split")
    assert predicted == predictions(tmp_path / "whole")
    assert predicted.keys() == one.keys()
    config = config_of(tmp_path / "data", task)
    for (step, client), lines in predicted.items():
        examples = held_out_examples(config, client)
        assert [line["right"] for line in lines] == [[e.choices[i].strip() for i in e.right] for e in examples]
        assert [line["question"] for line in lines] == [example.question for example in examples]
        assert all((line["decoded"] is None) == (task in ("multirc", "huatuo")) for line in lines)
        assert all((line["chosen"] is None) == (task in ("xsum", "huatuo")) for line in lines)
        correct, total, _ = one[step, client]
        assert len(lines) == total
        if correct is not None:
            assert sum(line["choices"][line["chosen"]] in line["right"] for line in lines) == correct


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    """Plain transformers' model, and the tokenizer."""
    builder = ModelBuilder.of(Config(model=ModelConfig(name_or_path="tiny-llama")))
    folder = builder.resolver.name_or_path
    return AutoModelForCausalLM.from_pretrained(folder).eval(), load_tokenizer(builder.resolver)


@pytest.mark.parametrize("rows", [1, 4, 8, 64])
def test_candidates_are_compared_as_one_forward_each_does(tmp_path: Path, tiny: tuple[Any, Any], rows: int) -> None:
    model, tokenizer = tiny
    data = load_client_data(config_of(tmp_path, "record", clients=1), 0, tokenizer)
    counts = [len(item.choices) for item in data.val_items]
    assert set(counts) == {3, 4}
    predictions, loss_sum, correct = [], 0.0, 0
    with torch.no_grad():
        for batch in data.eval_batches(rows):
            assert len(batch.lengths) <= max(rows, batch.choices[0])
            logits_BTV = model(input_ids=batch.ids_BT).logits
            score = score_eval(batch, logits_BTV[batch.label_rows_L, batch.label_positions_L])
            predictions += score.predictions
            loss_sum, correct = loss_sum + score.loss_sum, correct + score.correct
        expected = [[log_likelihood(model, item.prompt, ids) for ids in item.choices] for item in data.val_items]
    assert predictions == [scores.index(max(scores)) for scores in expected]
    assert loss_sum == pytest.approx(-math.fsum(s[i.gold] for s, i in zip(expected, data.val_items, strict=True)))
    right = [{example.choices[index] for index in example.right} for example in data.val]
    chosen = [example.choices[index] for example, index in zip(data.val, predictions, strict=True)]
    assert correct == sum(text in texts for text, texts in zip(chosen, right, strict=True))


def log_likelihood(model: Any, prompt: list[int], answer: list[int]) -> float:
    logprobs_TV = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return math.fsum(float(logprobs_TV[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


def test_any_right_candidate_is_right() -> None:
    items = [EvalItem(prompt=[1], choices=[[2, 3], [4], [5]], gold=1, right=frozenset({1, 2}))] * 2
    (batch,) = ClientData(
        client_id=0, seed=0, per_client_batch_size=1, train_rows=[], val=[], val_items=items
    ).eval_batches(8)
    logits_LV = torch.zeros(8, 9)  # label positions: 2 of the first candidate, then 1 and 1, twice
    logits_LV[3, 5] = 9.0  # the first example's third candidate
    logits_LV[4, 2], logits_LV[5, 3] = 9.0, 9.0  # the second example's first
    score = score_eval(batch, logits_LV)
    assert (score.predictions, score.correct, score.total, score.label_tokens) == ((2, 0), 1, 2, 2)


@pytest.mark.parametrize("rows", [1, 3])
def test_texts_are_decoded_as_plain_transformers_does(tmp_path: Path, tiny: tuple[Any, Any], rows: int) -> None:
    plain, tokenizer = tiny
    data = load_client_data(config_of(tmp_path, "xsum", clients=1), 0, tokenizer)
    builder = ModelBuilder.of(Config(model=ModelConfig(name_or_path="tiny-llama")))
    part = builder.part("whole", adapted=False).eval()
    model = ContinuedLM(builder.hf_config, lambda count: WholeChain(part, count), device=torch.device("cpu"))
    ended = copy.deepcopy(tokenizer)
    free = plain_text(plain, tokenizer, data.val_items[0], end=None)
    assert len(free) == 12
    for end in (tokenizer.eos_token_id, free[4]):  # a token that does come up ends the text before it
        ended.eos_token_id = end
        matched, texts = matches_and_texts(model, data.val_items, ended, rows=rows, max_new_tokens=12)
        assert matched == 0
        expected = [plain_text(plain, tokenizer, item, end=end) for item in data.val_items]
        assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert len(plain_text(plain, tokenizer, data.val_items[0], end=free[4])) == free.index(free[4])
    assert count_matches(model, data.val_items, rows=rows) == 0


def plain_text(model: Any, tokenizer: Any, item: EvalItem, end: int | None) -> list[int]:
    """Greedy decoding of one row without a cache, token by token."""
    ids = list(item.prompt)
    for _ in range(12):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(item.prompt) :]
