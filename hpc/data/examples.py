"""Which examples a client has: its own file or generator, or its share of everybody's. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hpc.config import Config, DataConfig
from hpc.data import partition, seeding
from hpc.data.folders import file_in
from hpc.data.hub import hub_records
from hpc.data.records import CLIENT_ID, examples_of, file_of_client, read_examples
from hpc.data.tasks import Example, make_example
from hpc.data.ward_notes import Split, ward_notes
from hpc.data.wording import task_of
from hpc.errors import DataError

HELD_OUT_SEED = 0


def training_examples(config: Config, client_id: int) -> list[Example]:
    """The client's own file, or its share of all clients' data."""
    if config.data.partition == "files":
        share = _of_site(config, client_id, "train")
    else:
        pool = _pool(config, "train")
        share = [pool[index] for index in _shares(config, pool)[client_id]]
    most, n = config.data.max_train_examples, len(share)
    if not most or n <= most:
        return share
    # Drawn, as files are often in some order, and so that another seed learns from other examples.
    drawn = seeding.permutation(seeding.stream(config.train.seed, "max_train_examples", client_id, n), n)[:most]
    return [share[index] for index in sorted(drawn)]


def held_out_examples(config: Config, client_id: int) -> list[Example]:
    """At most `val_examples` of the client's own file, or of its equal share of a file (or data set) for all.

    Held-out data is dealt evenly also where training data is skewed, and alike whatever the seed, so that all clients
    together score the same set. What belongs together stays so: a question is there with all of its answers.
    """
    data, train = config.data, config.train
    if not data.evaluates:
        return []
    if data.partition == "files" and (data.generated or CLIENT_ID in _place(data, "val")):
        return _capped(_of_site(config, client_id, "val"), data.val_examples)
    pool = _pool(config, "val")
    if data.partition == "group" or any(example.question is not None for example in pool):
        shares = partition.by_group(_groups(data, pool), train.clients, HELD_OUT_SEED)
    else:
        shares = partition.iid(len(pool), train.clients, HELD_OUT_SEED)
    return _capped([pool[index] for index in shares[client_id]], data.val_examples)


def _shares(config: Config, pool: Sequence[Example]) -> list[list[int]]:
    data, clients, seed = config.data, config.train.clients, config.train.seed
    if data.partition == "iid":
        return partition.iid(len(pool), clients, seed)
    if data.partition == "size":
        return partition.by_size(len(pool), clients, data.alpha, seed)
    if data.partition == "group":
        return partition.by_group(_groups(data, pool), clients, seed)
    if any(example.kind != "labels" for example in pool):
        raise DataError(
            f"--data.partition dirichlet skews labels, and {data.task} has none; use --data.partition size for shares "
            "of different size, or iid"
        )
    return partition.dirichlet([example.label for example in pool], clients, data.alpha, seed)


def _groups(data: DataConfig, pool: Sequence[Example]) -> list[str]:
    groups = [example.group for example in pool if example.group is not None]
    if len(groups) < len(pool):
        raise DataError(
            f"--data.partition group: {len(pool) - len(groups)} of {len(pool)} examples of {data.task} have no group; "
            "name the field to group by with --data.template.group_field, or use another partition"
        )
    return groups


def _capped(examples: list[Example], limit: int) -> list[Example]:
    """Drawn, alike for every seed, as far as there is room for a whole question each time; in their order."""
    if len(examples) <= limit:
        return examples
    questions: dict[str | int, list[int]] = {}
    for index, example in enumerate(examples):
        questions.setdefault(index if example.question is None else example.question, []).append(index)
    members, kept = list(questions.values()), list[int]()
    stream = seeding.stream(HELD_OUT_SEED, "val_examples", len(examples))
    for place in seeding.permutation(stream, len(members)):
        if len(kept) + len(members[place]) <= limit:
            kept += members[place]
    if not kept:
        raise DataError(
            f"--data.val_examples {limit} is less than the answers of one question, which are scored together; raise it"
        )
    return [examples[index] for index in sorted(kept)]


def _pool(config: Config, split: Split) -> list[Example]:
    """Everybody's examples in one order: a shared file, or every site's in turn."""
    if config.data.generated or CLIENT_ID in _place(config.data, split):
        return [example for site in range(config.train.clients) for example in _of_site(config, site, split)]
    return _of_site(config, 0, split)


def _place(data: DataConfig, split: Split) -> str:
    """The path that the user gave, or nothing where it is none."""
    return str(data.data_dir or (data.train_file if split == "train" else data.val_file) or "")


def _of_site(config: Config, site: int, split: Split) -> list[Example]:
    """What one site's file holds, or what its generator gives."""
    data, train = config.data, config.train
    task = task_of(data)
    if data.generated:
        count = data.train_examples if split == "train" else data.val_examples
        records = ward_notes(site=site, sites=train.clients, split=split, count=count, seed=train.seed)
        return [make_example(task, record, f"ward note {index} of site {site}") for index, record in enumerate(records)]
    if data.hub_name is not None:
        examples = examples_of(task, hub_records(data.task, data.hub_name, data.hub_config, split))
        if not examples:
            raise DataError(f"--data.hub_name {data.hub_name}: the {split} split is empty")
        return examples
    path: Path = file_of_client(_place(data, split), site)
    if data.data_dir is not None:
        return read_examples(file_in(path, data.task, split), task, flag="--data.data_dir")
    return read_examples(path, task, flag=f"--data.{split}_file")
