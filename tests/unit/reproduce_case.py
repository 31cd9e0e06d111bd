"""Runs' files made up by hand, of a preset that is as small as a preset can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc.reproduce import raw
from hpc.reproduce.methods import METHODS
from hpc.reproduce.plan import Job, cells_of, jobs_of, tuning_jobs
from hpc.reproduce.preset import Preset, load_preset
from hpc.reproduce.rows import Row

PRESET = """
scale: "made up: no run was made for it"
seeds: [0, 1]
common: {train.clients: 2}
models: {tiny: {model.name_or_path: tiny-llama}}
adapters: {lora: {adapter.method: lora, train.learning_rate: 0.01}}
tasks: {rte: {batches: 4}, cb: {batches: 4}}
tables:
  table1:
    - model: tiny
      adapters: [lora]
      tasks: [rte, cb]
      methods: [zero_shot, centralised, serial, centralised_union, client_batch, replica]
tuning: {model: tiny, tasks: [rte, cb], rates: {lora: [0.001, 0.01]}}
"""


def made_up_preset(folder: Path, text: str = PRESET) -> Preset:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "made_up.yaml").write_text(text, encoding="utf-8")
    return load_preset("made_up", folder)


def jobs(preset: Preset, **wanted: Any) -> list[Job]:
    """Of all tables; those whose fields are as `wanted`."""
    found = jobs_of(cells_of(preset, list(preset.tables), (), ()))
    return [job for job in found if all(getattr(job, name) == value for name, value in wanted.items())]


def raw_of(
    preset: Preset, job: Job, *, main: float = 50.0, losses: Sequence[float] = (2.0, 1.0), **more: Any
) -> dict[str, Any]:
    """A file's content. `main`: of the task's main metric; `more`: whatever else is to be in it."""
    metrics = {"accuracy": main, "unparsed": 0} | ({"macro_f1": main / 2} if job.task == "cb" else {})
    before = bool(job.flags["train.eval_before"])
    flags = job.flags
    content = {
        "format": raw.FORMAT,
        "preset": preset.name,
        "scale": preset.scale,
        "job": job.name,
        "model": job.model,
        "task": job.task,
        "adapter": job.adapter,
        "method": job.method,
        "seed": job.seed,
        "tuning": job.tuning,
        "fingerprint": job.fingerprint,
        "flags": dict(flags),
        "metrics": metrics,
        "metrics_before": dict.fromkeys(metrics, 25.0) | {"unparsed": 1} if before else None,
        "examples": 8,
        "eval_loss": 1.5,
        "losses": list(losses),
        "predictions": {"sha256": "same", "chosen": [0, 1]},
        "predictions_before": {"sha256": "before", "chosen": [1, 1]} if before else None,
        "versions": {"python": "3.11", "torch": "2.13"},
        "seconds": 6.0,
        "date": "2026-01-01 00:00 UTC",
        "command": "python launch/local.py",
        "git_commit": "abc",
        "data_sha256": "of the made-up data",
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gib": 8.0, "gpu": None},
        "config": {
            "model": {"name_or_path": flags["model.name_or_path"], "dtype": "float32"},
            "data": {
                "partition": "iid",
                "max_train_examples": 8,
                "max_source_length": 64,
                "max_target_length": 16,
                "evaluate_by": "likelihood",
            },
            "train": {
                "clients": 2,
                "per_client_batch_size": 2,
                "max_steps": flags["train.max_steps"],
                "learning_rate": flags["train.learning_rate"],
            },
        },
    }
    return content | more


def put(results: Path, preset: Preset, *contents: dict[str, Any]) -> None:
    for content in contents:
        raw.write(results / raw.FOLDER / preset.name / f"{content['job']}.json", content)


def fill(results: Path, preset: Preset) -> None:
    """Every run of the preset: seed 1 is better than seed 0 by 10; replicas are off by 2 in seed 0."""
    for job in jobs(preset):
        off = -2.0 if job.method == "replica" and job.seed == 0 else 0.0
        losses = (2.0, 1.0 + 1e-6) if job.method == "client_batch" else (2.0, 1.0)
        put(results, preset, raw_of(preset, job, main=50.0 + 10 * job.seed + off, losses=losses))
    for job in tuning_jobs(preset):
        put(results, preset, raw_of(preset, job, eval_loss=job.flags["train.learning_rate"] * -100))


def broken_promises(rows: list[Row]) -> list[str]:
    """Rows that must be as their reference and are not, or that lack it in some seed."""
    return [
        f"{row.table}, {row.task}, {row.adapter}, {row.method}"
        for row in rows
        if row.method in METHODS and METHODS[row.method].same_function and row.results and not _is_kept(row)
    ]


def _is_kept(row: Row) -> bool:
    found = row.comparison
    return found is not None and len(found.equal) == len(row.results) and found.is_kept
