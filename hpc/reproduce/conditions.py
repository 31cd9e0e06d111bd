"""Under which settings a table's runs were made, and where they come from: read from their files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hpc.bench.markdown import table as markdown
from hpc.reproduce.methods import METHODS
from hpc.reproduce.numbers import NOTHING, joined
from hpc.reproduce.raw import Raw
from hpc.reproduce.rows import Row, Runs

COLUMNS = (
    "task",
    "seeds",
    "clients",
    "training examples a client, at most",
    "batches",
    "examples a batch",
    "prompt / answer, tokens",
    "learning rate",
    "held-out examples",
    "answered by",
)
PACKAGES = ("python", "torch", "transformers", "peft", "deepspeed")


def settings(rows: Sequence[Row], runs: Runs) -> str:
    """One line a task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    return markdown(COLUMNS, [_line(task, [row for row in rows if row.task == task], runs) for task in tasks])


def origin(raws: Sequence[Raw], command: str) -> list[str]:
    """Machine, versions, commits, time and command: paragraphs."""
    dates = sorted(raw["date"] for raw in raws)
    when = " – ".join(dict.fromkeys([dates[0], dates[-1]]))
    minutes = sum(raw["seconds"] for raw in raws) / 60
    commits = ", ".join(f"`{commit}`" for commit in sorted({str(raw["git_commit"]) for raw in raws}))
    return [
        f"Made by `{command}`: {len(raws)} runs ({minutes:.1f} min of wall time together), {when}, commit {commits}. "
        "Each run's own command is in its file.",
        f"Machine: {joined(_machine(raw['machine']) for raw in raws)}. {joined(_versions(raw) for raw in raws)}.",
    ]


def model_of(raws: Iterable[Raw]) -> str:
    """Name and number format, as the runs were told."""
    models = [raw["config"]["model"] for raw in raws]
    return joined(f"{model['name_or_path']}, {model['dtype']}" for model in models)


def _line(task: str, rows: Sequence[Row], runs: Runs) -> list[str]:
    used = [(row.adapter, runs[result.run]) for row in rows for result in row.results]
    if not used:
        return [task, *[NOTHING] * (len(COLUMNS) - 1)]
    configs = [raw["config"] for _, raw in used]
    data, train = [config["data"] for config in configs], [config["train"] for config in configs]
    return [
        task,
        joined(sorted({raw["seed"] for _, raw in used})),
        joined(f"{each['clients']}, {config['partition']}" for each, config in zip(train, data, strict=True)),
        joined(each["max_train_examples"] or "all" for each in data),
        joined(_batches(raw) for _, raw in used),
        joined(each["per_client_batch_size"] for each in train),
        joined(f"{each['max_source_length']} / {each['max_target_length']}" for each in data),
        joined(f"{raw['adapter']} {raw['config']['train']['learning_rate']:g}" for _, raw in used),
        joined(raw["examples"] for _, raw in used),
        joined(each["evaluate_by"] for each in data),
    ]


def _batches(raw: Raw) -> int:
    """Of single clients, whatever the method makes a step of."""
    train: Mapping[str, Any] = raw["config"]["train"]
    return int(train["max_steps"] * (1 if METHODS[raw["method"]].by_client else train["clients"]))


def _machine(about: Mapping[str, Any]) -> str:
    return f"{about['cores']} cores ({about['cpu']}), {about['memory_gib']} GiB, {about['gpu'] or 'no GPU'}"


def _versions(raw: Raw) -> str:
    return ", ".join(f"{name} {raw['versions'].get(name)}" for name in PACKAGES)
