"""The committed file of a run: what it was, what it scored, where it comes from. One JSON a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc.config import Config
from hpc.errors import DataError
from hpc.report.events import decode
from hpc.report.provenance import without_folders
from hpc.report.summary import write_json_atomic
from hpc.reproduce.plan import Job

if TYPE_CHECKING:
    from hpc.reproduce.score import Scored

Raw = Mapping[str, Any]
FORMAT = 1
FOLDER = Path("raw") / "reproduce"
KINDS: Mapping[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("preset", "scale", "job", "model", "task", "adapter", "method", "fingerprint", "date"), str),
    **dict.fromkeys(("flags", "metrics", "predictions", "versions", "machine", "config"), dict),
    **dict.fromkeys(("metrics_before", "predictions_before"), (dict, type(None))),
    **dict.fromkeys(("format", "seed", "examples"), int),
    "tuning": bool,
    "eval_loss": (int, float),
    "losses": list,
    "command": str,
    "git_commit": (str, type(None)),
    "data_sha256": (str, type(None)),
}
# Also, in the file of a run that was attacked: "attacks", method → what came of it (`attacked.KEPT`).
"""What a table is made from."""


def raw_path(results: Path, preset: str, job: Job) -> Path:
    return results / FOLDER / preset / f"{job.name}.json"


def record(
    job: Job, preset: str, scale: str, config: Config, folder: Path, *, command: str, seconds: float, data: str | None
) -> dict[str, Any]:
    """The content of the file, from a finished run's folder. Raises `DataError` where the run has not finished."""
    from hpc.reproduce.score import score_run  # with torch, which who only reads these files can do without

    summary = decode(read_json(folder / "summary.json"))
    steps = int(summary["steps"])
    after = score_run(folder, config, steps)
    before = score_run(folder, config, 0) if config.train.eval_before else None
    kept = ("step_seconds", "seconds_per_step", "link_bytes_per_step", "peak_rss_mib", "parameters", "versions")
    return {
        "format": FORMAT,
        "preset": preset,
        "scale": scale,
        "job": job.name,
        "model": job.model,
        "task": job.task,
        "adapter": job.adapter,
        "method": job.method,
        "seed": job.seed,
        "tuning": job.tuning,
        "fingerprint": job.fingerprint,
        "data_sha256": data,
        "flags": _without_folders(dict(job.flags)),
        "metrics": after.metrics,
        "metrics_before": None if before is None else before.metrics,
        "examples": after.examples,
        "eval_loss": summary["eval"]["loss"],
        "eval_loss_before": summary["eval"]["loss_before"],
        **({"privacy": summary.get("privacy")} if job.attacks else {}),
        "losses": summary["losses"],
        "predictions": _predictions(after),
        "predictions_before": None if before is None else _predictions(before),
        **{key: summary[key] for key in kept},
        "seconds": seconds,
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": command,
        "git_commit": summary["git_commit"],
        "machine": summary["machine"],  # of the role that reported, which knows its GPU
        "config": _without_places(asdict(config)),
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, content)


def read(path: Path) -> Raw:
    """Raises `DataError` for a file that is not a run's, or not whole."""
    found: Raw = decode(read_json(path))
    missing = [key for key in KINDS if key not in found]
    wrong = [key for key, kind in KINDS.items() if key in found and not isinstance(found[key], kind)]
    if not missing and not wrong:
        wrong = [key for key, numbers in _numbers(found).items() if not _are_numbers(numbers)]
    if missing or wrong or found["format"] != FORMAT or found["job"] != path.stem:
        raise DataError(f"{path} {_fault(path, found, missing, wrong)}; delete it, and its run is done again")
    return found


def _numbers(content: Raw) -> dict[str, list[Any]]:
    """Key → what must be numbers; among metrics those without which they are none."""
    when = [key for key in ("metrics", "metrics_before") if content[key] is not None]
    metrics = {key: [*content[key].values(), content[key].get("unparsed")] for key in when}
    return metrics | {"losses": content["losses"]}


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, (int, float)) for value in values)


def _fault(path: Path, content: Raw, missing: list[str], wrong: list[str]) -> str:
    if missing:
        return f"has no {missing[0]!r}"
    if wrong:
        return f"has {content[wrong[0]]!r} as {wrong[0]!r}"
    if content["format"] != FORMAT:
        return f"is of format {content['format']}, not {FORMAT}"
    return f"is of run {content['job']}, whose name it does not have"


def read_all(results: Path, preset: str) -> Iterator[Raw]:
    """Every run's file of a preset, by name."""
    for path in sorted((results / FOLDER / preset).glob("*.json")):
        yield read(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and its run is done again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is no run's file; delete it, and its run is done again")
    return content


def _predictions(scored: Scored) -> dict[str, Any]:
    """Which choices were made; of decoded texts only their digest, as they may quote the data."""
    known = any(index is not None for index in scored.chosen)
    return {"sha256": scored.digest, "chosen": scored.chosen if known else None}


def _without_folders(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_folders(value) for key, value in content.items()}
    return without_folders(content) if isinstance(content, str) else content


def _without_places(content: dict[str, Any]) -> dict[str, Any]:
    """Where data, keys and results lie says nothing about a run."""
    content["data"]["data_dir"] = content["data"]["train_file"] = content["data"]["val_file"] = None
    content["run"]["output_dir"] = content["link"]["keys_dir"] = None
    cleaned: dict[str, Any] = _without_folders(content)
    return cleaned
