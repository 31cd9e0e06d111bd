"""One attack on one recorded run: what is reported, what is written, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc.cli import make_parser, parse, to_yaml
from hpc.config import Config
from hpc.errors import ConfigError, DataError
from hpc.privacy.attack_command import folder_to_attack, run_flags, steps_to_record
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.attack_run import attack_run
from hpc.privacy.attacks import registry
from hpc.privacy.attacks.registry import METHODS, Found, Material, Method
from hpc.privacy.recorded import load
from tests.loopback import run_split
from tests.unit.test_imports import MODULES, imports, within

FLAGS = {
    "model.name_or_path": "tiny-llama",
    "model.head_blocks": "1",
    "data.train_examples": "4",
    "data.val_examples": "0",
    "train.schedule": "client_batch",
    "train.clients": "2",
    "train.max_steps": "2",
    "train.per_client_batch_size": "2",
    "privacy.record_steps": "2",
}
SERVERS = ("hpc.server", "hpc.trunk", "hpc.served", "hpc.server_step", "hpc.shared_step", "hpc.replica_step")


def recorded_run(folder: Path, **flags: str) -> Path:
    parser = make_parser("")
    words = [word for key, value in {**FLAGS, **flags}.items() for word in (f"--{key}", value)]
    config, namespace = parse(parser, words)
    run_split(config, folder)
    (folder / "config.yaml").write_text(to_yaml(parser, namespace))
    return folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded_run(tmp_path_factory.mktemp("attacked"))


def test_causal_search_recovers_a_recorded_run_and_is_written_with_its_floors(run_folder: Path) -> None:
    result = attack_run(run_folder, AttackConfig(method="causal_search", max_rows=2))
    truth = load(run_folder, 0)[0].truth
    assert (result.rows, result.tokens) == (2, sum(map(len, truth.ids)))
    assert result.scores["token_accuracy"].attack.value >= 99  # the first step: nothing has been learnt yet
    for score in result.scores.values():
        assert set(score.floors) == {"unrelated", "unigram", "lm_only"}
        assert all(floor.value < score.attack.value for floor in score.floors.values())
    path = result.write(run_folder)
    document = json.loads(path.read_text())
    assert path.name == "attack-causal_search.json"
    assert document["scores"]["token_accuracy"]["attack"]["value"] == result.scores["token_accuracy"].attack.value
    assert {"versions", "machine", "command", "config", "options", "git_commit"} <= document.keys()
    assert str(run_folder) not in path.read_text(), "a machine's folder"
    assert "token_accuracy" in result.as_text()


def test_the_wire_stays_at_the_floor(run_folder: Path) -> None:
    """Each of n tokens is right by chance 1 in 256; five standard deviations above that is never seen."""
    result = attack_run(run_folder, AttackConfig(method="sealed_frames", max_rows=0))
    by_chance = 100 * (1 / 256 + 5 * (1 / 256 * 255 / 256 / result.tokens) ** 0.5)
    assert result.tokens > 500
    assert result.scores["token_accuracy"].attack.value < by_chance
    assert result.scores["token_accuracy"].attack.value < result.scores["token_accuracy"].floors["unigram"].value


def test_an_attack_gets_what_the_server_has_and_no_truth_of_the_victims(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Material] = []

    def runner(material: Material) -> Found:
        taken.append(material)
        labels = [list(sample.truth.label_ids) for sample in load(run_folder, 0)]
        return Found(labels=labels, figures={"leak": 0.5})

    monkeypatch.setitem(METHODS, "told", Method(runner=lambda: runner, needs_shadow=True))
    result = attack_run(run_folder, AttackConfig(method="told", max_rows=0))
    (material,) = taken
    assert all(
        torch.equal(a.smashed_SD, b.seen.smashed_SD) for a, b in zip(material.seen, load(run_folder, 0), strict=True)
    )
    assert {sample.seen.client_id for sample in material.shadow} == {1}
    assert result.figures == {"leak": 0.5}
    assert result.scores["label_accuracy"].attack.value == 100
    assert list(result.scores["label_accuracy"].floors) == ["unigram"]
    with pytest.raises(ConfigError, match=r"give --attack\.colluder"):
        attack_run(run_folder, AttackConfig(method="told", colluder=None))


def test_later_rows_can_be_asked_for(run_folder: Path) -> None:
    last = load(run_folder, 0)[-1]
    assert last.seen.step > 0
    result = attack_run(run_folder, AttackConfig(max_rows=1, first_step=last.seen.step))
    assert (result.steps, result.tokens) == ((last.seen.step, last.seen.step), len(last.truth.ids[0]))
    with pytest.raises(DataError, match=r"--attack\.first_step 99: the last step that was recorded"):
        attack_run(run_folder, AttackConfig(first_step=99))


def test_a_colluder_who_has_the_victims_rows_is_refused(run_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    for role in ("trunk-0", "client-1"):
        for path in (folder / "recordings" / role).glob("client-1.*"):
            path.unlink()
    for role, target in (("trunk-0", "trunk-0"), ("client-0", "client-1")):
        for path in (folder / "recordings" / role).glob("client-0.step-1.*"):
            shutil.copy(path, folder / "recordings" / target / path.name.replace("client-0", "client-1"))
    with pytest.raises(DataError, match=r"2 of the 2 rows of client 1 are also client 0's"):
        attack_run(folder, AttackConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "nearest_embeding"}, "did you mean nearest_embedding"),
        ({"victim": 5}, "recordings of clients 0, 1, and none of 5"),
        ({"colluder": 0}, "both client 0"),
        ({"max_rows": -1}, "must be at least 0"),
        ({"first_step": 2}, "the last step that was recorded of client 0 is 1"),
    ],
)
def test_bad_options_are_refused(run_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        attack_run(run_folder, AttackConfig(**options))


def test_a_run_without_recordings_says_how_to_record(run_folder: Path, tmp_path: Path) -> None:
    shutil.copy(run_folder / "config.yaml", tmp_path)
    with pytest.raises(DataError, match=r"--privacy\.record_steps N"):
        attack_run(tmp_path, AttackConfig())
    with pytest.raises(DataError, match="no run's folder"):
        attack_run(tmp_path / "elsewhere", AttackConfig())


def test_without_a_colluder_the_victims_own_rows_make_the_floors(run_folder: Path) -> None:
    result = attack_run(run_folder, AttackConfig(colluder=None, first_step=1, lm_floor=False))
    assert (result.shadow_rows, result.steps, result.rows) == (0, (1, 1), 2)
    assert set(result.scores["token_accuracy"].floors) == {"unrelated", "unigram"}
    assert result.scores["token_accuracy"].floors["unigram"].value > 0


def test_the_runs_own_flags_are_handed_on() -> None:
    words = [
        "--config",
        "a.yaml",
        "--attack.method",
        "x",
        "--train.seed=3",
        "--attack.victim=1",
        "--model.dtype",
        "float16",
    ]
    assert run_flags(words) == ["--config", "a.yaml", "--train.seed=3", "--model.dtype", "float16"]
    with pytest.raises(ConfigError, match="names one that was made"):
        folder_to_attack(Config(), AttackConfig(run_folder="there"), ["--config", "a.yaml"], Path("local.py"))
    with pytest.raises(ConfigError, match="the run has clients 0 to 1"):
        folder_to_attack(Config(), AttackConfig(victim=2), [], Path("local.py"))


def test_enough_steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config = replace(config, train=replace(config.train, max_steps=50, clients=2, per_client_batch_size=4))
    assert steps_to_record(config, AttackConfig(max_rows=16)) == 4
    assert steps_to_record(config, AttackConfig(max_rows=0)) == 50
    assert steps_to_record(config, AttackConfig(max_rows=4, first_step=9)) == 10
    assert steps_to_record(config, AttackConfig(max_rows=1000)) == 50
    turns = replace(config, train=replace(config.train, schedule="serial", sync_every=10))
    assert steps_to_record(turns, AttackConfig(max_rows=16)) == 14, "the colluder's turn begins behind 10 steps"
    assert steps_to_record(turns, AttackConfig(max_rows=16, colluder=None)) == 4
    assert steps_to_record(turns, AttackConfig(max_rows=48, colluder=7)) == 22, "client 0 again behind 20"
    assert steps_to_record(config, AttackConfig(max_rows=16, first_step=30)) == 34
    monkeypatch.setitem(registry.METHODS, "learns", Method(runner=lambda: lambda material: Found(), needs_shadow=True))
    assert steps_to_record(config, AttackConfig(method="learns")) == 50


@pytest.mark.parametrize("module", [name for name in MODULES if within(name, "hpc.privacy.attacks")])
def test_attacks_know_no_server(module: str) -> None:
    """What an attack uses must be what an attacker has: recordings and public weights."""
    found = [name for name in imports(MODULES[module]) if any(within(name, server) for server in SERVERS)]
    assert not found, f"{module} imports {found}"
