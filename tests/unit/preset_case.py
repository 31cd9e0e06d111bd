"""Presets for tests: as YAML, and as what is read from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hpc.reproduce.preset import Preset, load_preset

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "launch" / "presets"
METHODS = ["zero_shot", "centralised", "serial", "fedbert", "centralised_union", "client_batch", "replica"]


def content(**changes: Any) -> dict[str, Any]:
    """A preset that is right, with some of its sections changed; None leaves one out."""
    given = {
        "scale": "for a test",
        "seeds": [0, 1],
        "common": {"train.clients": 2, "data.partition": "iid", "data.max_source_length": 96},
        "models": {"tiny": {"model.name_or_path": "tiny-llama"}},
        "adapters": {
            "prefix": {"adapter.method": "p_tuning_v2", "adapter.num_virtual_tokens": 4},
            "lora": {"adapter.lora_r": 4},
        },
        "tasks": {"rte": {"batches": 7}, "copa": {"batches": 4, "seeds": [3], "flags": {"train.clients": 4}}},
        "tables": {
            "table1": [{"model": "tiny", "adapters": ["prefix", "lora"], "tasks": ["rte", "copa"], "methods": METHODS}],
            "table4": [
                {"model": "tiny", "adapters": ["lora"], "tasks": ["rte"], "methods": ["zero_shot", "centralised"]}
            ],
        },
        **changes,
    }
    return {key: value for key, value in given.items() if value is not None}


def write_preset(folder: Path, given: Any, name: str = "mine") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(given if isinstance(given, str) else yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return path


def preset_of(folder: Path, **changes: Any) -> Preset:
    return load_preset(str(write_preset(folder, content(**changes))), SHIPPED)
