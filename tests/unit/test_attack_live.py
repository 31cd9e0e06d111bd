"""The attack of a hostile server from a configuration: what it reports, and what it refuses before it begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hpc.config import AdapterConfig, Config, PrivacyConfig
from hpc.errors import ConfigError
from hpc.privacy.attack_command import attacked
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attack_options import HijackOptions
from tests.unit.learned_case import config

OPTIONS = AttackConfig(method="fsha", max_rows=6, fsha=HijackOptions(hidden=32, shadow_tokens=128))
LOCAL = Path("local.py")


def recipe(folder: Path) -> Config:
    base = config()
    train = replace(base.train, schedule="client_batch", max_steps=6)
    run = replace(base.run, output_dir=str(folder))
    return replace(base, train=train, run=run, privacy=PrivacyConfig(detector="warn"))


def test_a_recipe_is_steered_read_and_scored_beside_its_floors(tmp_path: Path) -> None:
    result, folder = attacked(recipe(tmp_path / "run"), OPTIONS, [], LOCAL)
    assert (result.rows, result.steps) == (6, (4, 5)), "the last rows, when the head was steered"
    assert result.figures["steps"] == 6
    assert 4 <= result.figures["detector_noticed_at_step"] <= 6
    assert set(result.scores["token_accuracy"].floors) == {"unrelated", "unigram", "lm_only"}
    assert result.scores["token_accuracy"].attack.value > 0
    document = json.loads(result.write(folder).read_text())
    assert document["figures"] == result.figures
    with pytest.raises(ConfigError, match="holds a run already"):
        attacked(recipe(tmp_path / "run"), OPTIONS, [], LOCAL)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"run_folder": "there"}, "leave out --attack.run_folder"),
        ({}, {"colluder": None}, "give --attack.colluder"),
        ({}, {"victim": 2}, "the run has clients 0 to 1"),
        ({"adapter": AdapterConfig(parts=["tail"])}, {}, "learns nothing"),
        ({"schedule": "pipelined"}, {}, "not of pipelined"),
    ],
)
def test_what_cannot_be_steered_is_refused_with_code_2(
    change: dict[str, object], options: dict[str, object], words: str, tmp_path: Path
) -> None:
    run, change = recipe(tmp_path / "run"), dict(change)
    if "schedule" in change:
        run = replace(run, train=replace(run.train, schedule=change.pop("schedule")))  # type: ignore[arg-type]
    run = replace(run, privacy=PrivacyConfig(), **change)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=words) as refused:
        attacked(run, replace(OPTIONS, **options), [], LOCAL)  # type: ignore[arg-type]
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
