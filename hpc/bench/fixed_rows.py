"""The same few training examples for federations of any number of clients, whatever the task.

They are written to a file of their own, which is dealt to the clients: with a number of clients that divides theirs,
every client gets equally many, and once all clients have been through their share all have been seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpc.config import Config
from hpc.data.examples import training_examples
from hpc.errors import DataError

FLAGS = (
    *("--data.task", "jsonl", "--data.partition", "iid", "--data.max_train_examples", "0"),
    *("--data.data_dir", "null", "--data.hub_name", "null", "--data.val_file", "null"),
    *("--data.template.answer", " {answer}", "--data.template.cut", "passage", "--data.template.prompt"),
)


def write_rows(config: Config, count: int, path: Path) -> tuple[str, ...]:
    """The flags of a run on the first `count` training examples of the task. Raises `DataError` if it has fewer."""
    alone = replace(config, train=replace(config.train, clients=1, clients_per_round=0, min_clients=0))
    examples = training_examples(alone, 0)[:count]
    if len(examples) < count:
        raise DataError(f"{config.data.task} has {len(examples)} training examples; {count} are needed")
    # A prompt that is too long loses the end of its passage, and not the question behind it.
    parted = all(example.passage and example.after.strip() for example in examples)
    records = [
        {"passage": example.before + example.passage, "after": example.after, "answer": example.answer.strip()}
        if parted
        else {"passage": example.prompt(), "answer": example.answer.strip()}
        for example in examples
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return (*FLAGS, "{passage}{after}" if parted else "{passage}", "--data.train_file", str(path))


def lengths(flags: Sequence[str]) -> list[int]:
    """Tokens of each of the rows, prompt and answer."""
    from hpc.cli import make_parser, parse
    from hpc.data.dataset import load_client_data
    from hpc.model.pretrained import load_tokenizer
    from hpc.source.resolve import resolve

    own = (*flags, "--train.clients", "1", "--data.val_examples", "0")
    config = parse(make_parser(str(__doc__)), list(own))[0]
    return [len(row.ids) for row in load_client_data(config, 0, load_tokenizer(resolve(config.model))).train_rows]
