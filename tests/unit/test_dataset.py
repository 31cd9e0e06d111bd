"""A client's share, its batches as a pure function of the step, and the scores of its held-out examples."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from hpc.config import Config, DataConfig, TrainConfig
from hpc.data.dataset import (
    ClientData,
    EvalBatch,
    EvalItem,
    held_out_examples,
    load_client_data,
    score_eval,
    training_examples,
)
from hpc.errors import DataError
from hpc.source.tiny import tiny_llama_folder


@pytest.fixture(scope="module")
def bytewise() -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama_folder(seed=0))


def config(clients: int = 2, seed: int = 0, batch: int = 4, **data: Any) -> Config:
    return Config(
        data=DataConfig(**{"train_examples": 10, "val_examples": 6, **data}),
        train=TrainConfig(clients=clients, seed=seed, per_client_batch_size=batch),
    )


def write(path: Path, count: int, tag: str = "") -> Path:
    records = [{"passage": f"{tag}{i}", "question": "is it", "label": i % 2 == 0} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def rows_of(data: ClientData, steps: range) -> list[tuple[int, ...]]:
    batches = [data.train_batch(step) for step in steps]
    return [tuple(ids[:n]) for b in batches for ids, n in zip(b.ids_BT.tolist(), b.lengths, strict=True)]


def test_a_batch_is_a_pure_function_of_seed_client_and_step(bytewise: Any) -> None:
    data, again = (load_client_data(config(), 0, bytewise) for _ in range(2))
    later_first = [data.train_batch(step) for step in (5, 0)]
    for batch, step in zip(later_first, (5, 0), strict=True):
        assert torch.equal(batch.ids_BT, again.train_batch(step).ids_BT)
    others = [load_client_data(config(), 1, bytewise), load_client_data(config(seed=1), 0, bytewise)]
    assert all(rows_of(other, range(3)) != rows_of(data, range(3)) for other in others)


@pytest.mark.parametrize("batch", [1, 3, 4, 10, 23])
def test_batches_walk_through_whole_epochs_in_new_orders(bytewise: Any, batch: int) -> None:
    data = load_client_data(config(batch=batch), 0, bytewise)
    rows = rows_of(data, range(-(-30 // batch)))
    epochs = [rows[start : start + 10] for start in (0, 10, 20)]
    everything = collections.Counter(tuple(row.ids) for row in data.train_rows)
    assert all(collections.Counter(epoch) == everything for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert all(len(data.train_batch(step).lengths) == batch for step in range(5))


def test_files_gives_each_client_its_own(bytewise: Any, tmp_path: Path) -> None:
    for client in range(2):
        write(tmp_path / f"{client}.jsonl", 5, tag=f"client{client}-")
    mine = config(task="jsonl", train_file=str(tmp_path / "{client_id}.jsonl"))
    assert {e.passage[:8] for e in training_examples(mine, 1)} == {"client1-"}
    assert held_out_examples(mine, 1) == []
    assert load_client_data(mine, 1, bytewise).eval_batches(4) == []
    with pytest.raises(DataError, match=r"2\.jsonl \(--data.train_file\) cannot be read"):
        training_examples(mine, 2)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize("task", ["jsonl", "ward_notes"])
def test_dealt_shares_are_disjoint_and_complete(tmp_path: Path, partition: str, task: str) -> None:
    files = {"train_file": str(write(tmp_path / "t", 60)), "val_file": str(write(tmp_path / "v", 18))}
    dealt = config(
        clients=3, task=task, partition=partition, alpha=5.0, train_examples=20, **(files if task == "jsonl" else {})
    )
    for share_of, total in ((training_examples, 60), (held_out_examples, 18)):
        passages = [e.prompt() for client in range(3) for e in share_of(dealt, client)]
        assert len(passages) == len(set(passages)) == total


def test_a_shared_held_out_file_is_dealt_and_capped(tmp_path: Path) -> None:
    write(tmp_path / "0", 5)
    files = {"train_file": str(tmp_path / "{client_id}"), "val_file": str(write(tmp_path / "v", 40))}
    shares = [{e.passage for e in held_out_examples(config(task="jsonl", **files), client)} for client in range(2)]
    assert [len(share) for share in shares] == [6, 6]
    assert not shares[0] & shares[1]
    assert held_out_examples(config(task="jsonl", **{**files, "val_file": None}), 0) == []
    assert held_out_examples(config(val_examples=0), 0) == []


def test_a_client_without_data_is_named(tmp_path: Path) -> None:
    few = config(clients=4, task="jsonl", partition="iid", train_file=str(write(tmp_path / "t", 3)))
    with pytest.raises(DataError, match="client 3 is left without examples"):
        training_examples(few, 0)


def data_of(items: list[EvalItem]) -> ClientData:
    return ClientData(client_id=0, seed=0, per_client_batch_size=1, train_rows=[], val=[], val_items=items)


def test_one_token_verbalisers_take_one_row_each() -> None:
    items = [EvalItem(prompt=[1] * (3 + i), choices=[[7], [9]], gold=i % 2) for i in range(5)]
    batches = data_of(items).eval_batches(2)
    assert [len(b.lengths) for b in batches] == [2, 2, 1]
    first = batches[0]
    assert first.lengths == (3, 4)
    assert first.label_positions_L.tolist() == [2, 3]
    assert first.label_ids_L.tolist() == [7, 9]
    logits_LV = torch.zeros(2, 12)
    logits_LV[0, 7], logits_LV[1, 7], logits_LV[:, 3] = 1.0, 2.0, 99.0
    score = score_eval(first, logits_LV)
    assert (score.correct, score.total, score.predictions, score.label_tokens) == (1, 2, (0, 0), 2)
    # Over the whole vocabulary: token 3, no verbaliser, takes nearly all of the probability.
    assert score.loss_sum == pytest.approx((99 - 1) + (99 - 0))


def test_held_out_loss_is_in_float32_whatever_the_logits_are() -> None:
    (batch,) = data_of([EvalItem(prompt=[1], choices=[[7], [9]], gold=0)]).eval_batches(1)
    logits_LV = torch.randn(1, 12, generator=torch.manual_seed(0)).bfloat16()
    plain = -math.log(math.exp(logits_LV[0, 7]) / sum(math.exp(logit) for logit in logits_LV[0]))
    assert score_eval(batch, logits_LV).loss_sum == pytest.approx(plain, rel=1e-5)


def test_only_the_right_verbalisers_rows_count_in_the_loss() -> None:
    items = [
        EvalItem(prompt=[1, 1], choices=[[7, 8], [9]], gold=0),
        EvalItem(prompt=[1], choices=[[7, 8], [9]], gold=1),
        EvalItem(prompt=[1, 1, 1], choices=[[7, 8], [9]], gold=1),
    ]
    (batch,) = data_of(items).eval_batches(8)
    logits_LV = torch.randn(len(batch.label_ids_L), 12, generator=torch.manual_seed(0))
    plain = [-float(logits_LV[place].log_softmax(-1)[token]) for place, token in ((0, 7), (1, 8), (5, 9), (8, 9))]
    score = score_eval(batch, logits_LV)
    assert score.label_tokens == 4
    assert score.loss_sum == pytest.approx(math.fsum(plain))


def test_the_answer_is_not_in_the_rows_that_ask_for_it() -> None:
    items = [EvalItem(prompt=[1] * n, choices=[[7], [9]], gold=1) for n in (2, 5)]
    (batch,) = data_of(items).eval_batches(8)
    assert set(batch.ids_BT.flatten().tolist()) <= {0, 1}


def test_longer_verbalisers_are_scored_by_their_log_probabilities(bytewise: Any) -> None:
    """Against a plain computation: one unpadded forward for each prompt and verbaliser."""
    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder(seed=0)).eval()
    data = load_client_data(config(val_examples=7), 1, bytewise)
    batches = data.eval_batches(4)
    assert [b.gold for b in batches] == [tuple(e.label for e in data.val[i : i + 2]) for i in range(0, 7, 2)]
    predictions: list[int] = []
    expected: list[int] = []
    loss_sum, plain_loss, label_tokens = 0.0, 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits_BTV = model(input_ids=batch.ids_BT).logits
            scored = score_eval(batch, logits_BTV[batch.label_rows_L, batch.label_positions_L])
            predictions += scored.predictions
            loss_sum, label_tokens = loss_sum + scored.loss_sum, label_tokens + scored.label_tokens
            assert scored.correct == sum(p == g for p, g in zip(scored.predictions, batch.gold, strict=True))
            assert scored.total == len(batch.gold)
        for item in data.val_items:
            scores = []
            for answer in item.choices:
                logprobs_TV = model(input_ids=torch.tensor([item.prompt + answer])).logits[0].log_softmax(-1)
                tail = logprobs_TV[len(item.prompt) - 1 : -1]
                scores.append(sum(float(row_V[token]) for row_V, token in zip(tail, answer, strict=True)))
            expected.append(scores.index(max(scores)))
            plain_loss -= scores[item.gold]
    assert predictions == expected
    assert loss_sum == pytest.approx(plain_loss, rel=1e-5)
    assert label_tokens == sum(len(item.choices[item.gold]) for item in data.val_items)


def test_an_eval_batch_holds_whole_examples_even_if_it_is_small() -> None:
    items = [EvalItem(prompt=[1], choices=[[7, 8], [9]], gold=0)] * 2
    batches = data_of(items).eval_batches(1)
    assert [len(b.lengths) for b in batches] == [2, 2]
    assert all(isinstance(b, EvalBatch) and b.choice_ids_EC is None for b in batches)


def test_client_data_is_frozen(bytewise: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load_client_data(config(), 0, bytewise).seed = 1  # type: ignore[misc]
