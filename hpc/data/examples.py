"""Which examples a client has: its own file or generator, or its share of everybody's. Imports no torch."""

from __future__ import annotations

from hpc.config import Config
from hpc.data import partition
from hpc.data.records import CLIENT_ID, file_of_client, read_examples
from hpc.data.tasks import FORMATS, Example, make_example
from hpc.data.ward_notes import Split, ward_notes


def training_examples(config: Config, client_id: int) -> list[Example]:
    """The client's own file, or its share of all clients' data."""
    data, train = config.data, config.train
    if data.partition == "files":
        return _of_site(config, client_id, "train")
    pool = _pool(config, "train")
    if data.partition == "iid":
        shares = partition.iid(len(pool), train.clients, train.seed)
    else:
        shares = partition.dirichlet([example.label for example in pool], train.clients, data.alpha, train.seed)
    return [pool[index] for index in shares[client_id]]


def held_out_examples(config: Config, client_id: int) -> list[Example]:
    """At most `val_examples` of the client's own file, or of its equal share of a file (or data set) for all.

    Held-out data is dealt evenly also where training data is skewed, so that all clients together score the same set.
    """
    data, train = config.data, config.train
    if data.val_examples == 0 or (data.task != "ward_notes" and data.val_file is None):
        return []
    if data.partition == "files" and (data.task == "ward_notes" or CLIENT_ID in str(data.val_file)):
        return _of_site(config, client_id, "val")[: data.val_examples]
    pool = _pool(config, "val")
    share = partition.iid(len(pool), train.clients, train.seed)[client_id]
    return [pool[index] for index in share[: data.val_examples]]


def _pool(config: Config, split: Split) -> list[Example]:
    """Everybody's examples in one order: a shared file, or every site's in turn."""
    path = config.data.train_file if split == "train" else config.data.val_file
    if config.data.task == "ward_notes" or CLIENT_ID in str(path):
        return [example for site in range(config.train.clients) for example in _of_site(config, site, split)]
    return _of_site(config, 0, split)


def _of_site(config: Config, site: int, split: Split) -> list[Example]:
    """What one site's file holds, or what its generator gives."""
    data, train = config.data, config.train
    task = FORMATS[data.task]
    if data.task != "ward_notes":
        path = data.train_file if split == "train" else data.val_file
        return read_examples(file_of_client(str(path), site), task, flag=f"--data.{split}_file")
    count = data.train_examples if split == "train" else data.val_examples
    records = ward_notes(site=site, sites=train.clients, split=split, count=count, seed=train.seed)
    return [make_example(task, record, f"ward note {index} of site {site}") for index, record in enumerate(records)]
