"""Everything that can be wrong with a table's runs, found before the first one starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from hpc.cli import parse_quickly
from hpc.config import Config
from hpc.data.folders import FOLDERS, content_of, file_in
from hpc.errors import ConfigError, DataError
from hpc.preflight import check, check_data
from hpc.rules import require
from hpc.source.resolve import resolve

CLIENT_ID = "{client_id}"


def configs_of(preset: str, flags: Mapping[str, list[str]]) -> dict[str, Config]:
    """Run → its configuration, from its flags. Raises `ConfigError` that names the preset, the key and the run."""
    found = {}
    for name, given in flags.items():
        try:
            found[name] = parse_quickly(given)
        except ConfigError as error:
            raise ConfigError(f"--preset {preset}: {error} (in the flags of {name})") from None
    return found


def check_configs(configs: Iterable[Config]) -> None:
    """Each model and each client's data once. Raises a `BadInput` error for the first that no run could work with."""
    models = {repr((each.model, each.adapter, each.trunk, each.train.schedule)): each for each in configs}
    for each in models.values():
        check(each, coordinates=False)
    data = {repr((each.data, each.train.clients, each.model.name_or_path, _draw(each))): each for each in configs}
    for each in data.values():
        _check_data(each)


def _draw(config: Config) -> int:
    """Where training examples are drawn, each seed has others; else all of them are seen, whatever the seed."""
    return config.train.seed if config.data.max_train_examples else 0


def _check_data(config: Config) -> None:
    """Read and tokenise as the clients will. A run without held-out examples would have nothing for a table."""
    from hpc.data.dataset import load_client_data
    from hpc.model.pretrained import load_tokenizer

    task, how = config.data.task, config.data.evaluate_by
    require(config.data.evaluates, f"{task}: data.val_examples is 0, so nothing would be scored; raise it")
    check_data(config, range(config.train.clients))  # needs no tokenizer, so it is quick to refuse
    tokenizer = load_tokenizer(resolve(config.model))
    for client_id in range(config.train.clients):
        chooses = load_client_data(config, client_id, tokenizer).chooses
        require(
            chooses or how == "generation",
            f"{task}: data.evaluate_by is {how}, and texts are scored as generated; make it generation",
        )


def folder_of(data_dir: Path, folder: str, task: str) -> Path:
    """Where a task's files are: in the preset's `folder` or the publisher's. Raises `DataError` if in none."""
    if CLIENT_ID in folder:
        return data_dir / folder
    if not data_dir.is_dir():
        raise DataError(f"--data_dir {data_dir} is no folder; give the one that holds the data sets (docs/data.md)")
    names = list(dict.fromkeys((folder, *FOLDERS.get(task, ()))))
    for name in names:
        if (data_dir / name / "train.jsonl").is_file():
            return data_dir / name
    if (data_dir / folder).is_dir():
        file_in(data_dir / folder, task, "train")  # raises, unless the publisher's folders are in it
        return data_dir / folder
    looked = ", ".join(f"{name}/train.jsonl" for name in names)
    raise DataError(f"--data_dir {data_dir} has no data of {task}: looked for {looked}; {content_of(data_dir)}")
