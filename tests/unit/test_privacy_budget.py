"""The ledger of releases, the budget that stops a run, and settings that cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpc.cli import parse_quickly
from hpc.config import AdapterConfig, Config, DataConfig, ModelConfig, PrivacyConfig, TrainConfig
from hpc.data.dataset import ClientData, EvalItem
from hpc.data.rows import Row
from hpc.errors import BadInput, BudgetSpent, CheckpointError, ConfigError, Paused
from hpc.link.kinds import Kind
from hpc.privacy.defences.accounting import Releases
from hpc.privacy.defences.ledger import Ledger
from hpc.privacy.defences.prepare import ledger_path, shield_for, shield_to_generate
from hpc.privacy.defences.telling import told
from hpc.report.events import read_events, role_path
from hpc.report.privacy import privacy_figures
from hpc.resume import committed_steps, fault
from tests.loopback import run_split


def config_of(steps: int = 2, **privacy: Any) -> Config:
    """Every example is used in each step."""
    return Config(
        model=ModelConfig(name_or_path="tiny-llama"),
        adapter=AdapterConfig(lora_r=4),
        data=DataConfig(train_examples=3, val_examples=0),
        train=TrainConfig(clients=1, max_steps=steps, per_client_batch_size=3, save_every=1),
        privacy=PrivacyConfig(**{"clip_norm": 1.0, **privacy}),
    )


def data_of(examples: int = 3) -> ClientData:
    rows = [Row(ids=[1] * (4 + k), prompt_len=3) for k in range(examples)]
    return ClientData(client_id=0, seed=0, per_client_batch_size=3, train_rows=rows, val=[], val_items=[])


def test_a_run_that_goes_beyond_its_budget_stops_before_the_release_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    """Planned for two steps, the run is taken up for four, and, after that, killed behind its first step."""
    run_split(config_of(2, epsilon=20.0), tmp_path)
    planned = Ledger(ledger_path(tmp_path, 0))
    assert planned.smashed == {0: 2, 1: 2, 2: 2}
    sent: list[Kind] = []

    def prepare(client: Any) -> None:
        send = client.channel.send
        client.channel.send = lambda header, tensor=None: (sent.append(header.kind), send(header, tensor))

    for start in (2, 1):
        with pytest.raises(BudgetSpent, match=rf"before step {start + 1}: .*above --privacy.epsilon 20. Raise") as end:
            run_split(config_of(4, epsilon=20.0), tmp_path, start=start, prepare=prepare)
        assert end.value.exit_code == 2
        assert "released 3 times" in str(end.value)
    assert sent
    assert not {Kind.SMASHED, Kind.EVAL_SMASHED, Kind.DECODE} & set(sent)
    assert committed_steps(tmp_path) == [1, 2]
    assert fault(tmp_path, 2) is None
    assert Ledger(ledger_path(tmp_path, 0)).smashed == planned.smashed

    # More epsilon, and the same noise as before, takes the run on.
    run_split(config_of(3, epsilon=40.0), tmp_path, start=2)
    ledger = Ledger(ledger_path(tmp_path, 0))
    assert ledger.smashed == {0: 3, 1: 3, 2: 3}
    assert planned.settings == ledger.settings
    events = {"client-0": read_events(role_path(tmp_path, "client-0"))}
    figures = privacy_figures(events)
    assert figures is not None
    assert (figures["client"], figures["releases"], figures["budget"]) == ("client-0", 3, 40.0)
    assert 20 < figures["epsilon"] < 40


def test_a_budget_that_ends_between_two_steps_ends_the_run_there_with_a_checkpoint(tmp_path: Path) -> None:
    """The trunk is told in time, so nothing that was learned is lost, and nobody merely misses a client."""
    config = config_of(2, epsilon=20.0)
    shield_for(config, data_of(), tmp_path)  # the noise is worked out for two steps; the run is to have five
    config = replace(config, train=replace(config.train, max_steps=5, save_every=0))
    with pytest.raises((BudgetSpent, Paused), match="after step 2, with a checkpoint"):
        run_split(config, tmp_path)
    assert committed_steps(tmp_path) == [2]
    assert fault(tmp_path, 2) is None
    assert Ledger(ledger_path(tmp_path, 0)).smashed == {0: 2, 1: 2, 2: 2}


def test_repeated_steps_count_again(tmp_path: Path) -> None:
    config = config_of(2, noise_multiplier=3.0)
    run_split(config, tmp_path)
    run_split(config, tmp_path, start=1)  # as if it had been killed behind its first step
    account = shield_for(config, data_of(), tmp_path).account
    assert account is not None
    assert account.made == Releases(smashed=3, gradients=3)
    assert account.epsilon(account.made) > account.epsilon(account.planned)


def test_a_killed_process_leaves_its_count(tmp_path: Path) -> None:
    config = config_of(noise_multiplier=3.0)
    shield = shield_for(config, data_of(), tmp_path)
    shield.training(0, [0, 1, 2], [0, 1, 2])
    shield.training(1, [0, 1, 1], [1, 1])  # the server's cache has row 0
    with ledger_path(tmp_path, 0).open("a") as file:
        file.write('{"step": 2, "ro')  # killed before the release
    ledger = Ledger(ledger_path(tmp_path, 0))
    assert ledger.smashed == {0: 1, 1: 3, 2: 1}
    assert ledger.gradients == {0: 2, 1: 3, 2: 1}
    assert ledger.total == 5


def test_the_budget_is_for_the_unit_that_is_released_most(tmp_path: Path) -> None:
    shield = shield_for(config_of(2, epsilon=5.0), data_of(), tmp_path)
    shield.training(0, [0, 1], [0, 1])
    shield.training(1, [0, 2], [0, 2])
    with pytest.raises(BudgetSpent):
        shield.training(2, [1, 0], [1, 0])
    shield.training(2, [1, 2], [1, 2])


def test_evaluations_come_out_of_the_same_budget(tmp_path: Path) -> None:
    config = replace(config_of(1, epsilon=5.0), data=DataConfig(train_examples=3, val_examples=2))
    data = replace(data_of(), val_items=[EvalItem(prompt=[1, 2], choices=[[3], [4]], gold=0)])
    shield = shield_for(config, data, tmp_path)  # two evaluations, before and after the one step
    shield.evaluation(0)
    shield.evaluation(1)
    with pytest.raises(BudgetSpent, match="the evaluation after step 2"):
        shield.evaluation(2)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"noise_multiplier": 2.0}, "noise_multiplier: then 3.0, now 2.0"),
        ({"clip_norm": 5.0}, "clip_norm: then 1.0, now 5.0"),
        ({"delta": 1e-6}, "delta: then 1e-05, now 1e-06"),
        ({"unit": "example"}, "unit: then token, now example"),
        ({"label_protection": "max_norm"}, "label_protection: then none, now max_norm"),
        ({"noise_multiplier": 0.0}, "now --privacy asks for none"),
    ],
)
def test_a_run_keeps_its_settings_when_it_is_taken_up(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    given = {"noise_multiplier": 3.0}
    shield_for(config_of(**given), data_of(), tmp_path)
    with pytest.raises(CheckpointError, match=what):
        shield_for(config_of(**{**given, **changes}), data_of(), tmp_path)
    with pytest.raises(CheckpointError, match="examples: then 3, now 4"):
        shield_for(config_of(**given), data_of(4), tmp_path)


def test_a_checkpoint_and_a_ledger_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    noised = shield_for(config_of(noise_multiplier=3.0), data_of(), tmp_path)
    noised.training(0, [0, 1, 2], [0, 1, 2])
    facts = noised.state()
    noised.check(facts)
    ledger_path(tmp_path, 0).unlink()
    with pytest.raises(CheckpointError, match=r"counts 0 released rows, but up to this checkpoint .* in 3 rows"):
        shield_for(config_of(noise_multiplier=3.0), data_of(), tmp_path).check(facts)
    with pytest.raises(CheckpointError, match="without noise"):
        shield_for(config_of(noise_multiplier=3.0), data_of(), tmp_path).check({})
    ledger_path(tmp_path, 0).unlink()
    with pytest.raises(CheckpointError, match="give the same --privacy settings"):
        shield_for(config_of(clip_norm=0), data_of(), tmp_path).check(facts)


def test_what_cannot_be_counted_is_not_released(tmp_path: Path) -> None:
    shield = shield_for(config_of(noise_multiplier=3.0), data_of(), tmp_path)
    path = ledger_path(tmp_path, 0)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="what cannot be counted is not released"):
        shield.training(0, [0], [0])
    path.rmdir()
    path.write_text('{"step": 0, "rows": 3}\n')
    with pytest.raises(CheckpointError, match="is broken at"):
        shield_for(config_of(noise_multiplier=3.0), data_of(), tmp_path)


def test_generation_takes_the_noise_that_the_runs_budget_came_to(tmp_path: Path) -> None:
    config = config_of(epsilon=5.0)
    with pytest.raises(ConfigError, match="give the --run_folder"):
        shield_to_generate(config, None, 0)
    of_run = shield_for(config, data_of(), tmp_path)
    assert shield_to_generate(config, str(tmp_path), 0).noise_multiplier == of_run.noise_multiplier > 0
    assert shield_to_generate(config_of(noise_multiplier=2.0), None, 0).noise_multiplier == 2.0


def test_what_is_told_names_the_unit_and_what_is_not_covered(tmp_path: Path) -> None:
    for number, unit in enumerate(("token row by itself", "one example")):
        config = config_of(noise_multiplier=3.0, unit=("token", "example")[number])
        words = told(shield_for(config, data_of(), tmp_path / unit).figures(), config)
        assert unit in words
        for part in ("gradients that go back", "client head learns", "client parts' gradients", "row lengths"):
            assert part in words
        assert "numbers of label tokens" in words
        assert "the norm of the client parts' gradient" in words
    config = config_of(clip_norm=0, noise_scale=1.0)
    assert "no guarantee" in told(shield_for(config, data_of(), tmp_path / "fedsea").figures(), config)


NOISE = {"clip_norm": 1.0, "noise_multiplier": 1.0}


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ({"epsilon": 0, "clip_norm": 1}, "--privacy.epsilon is 0"),
        ({"epsilon": -1, "clip_norm": 1}, "--privacy.epsilon is -1"),
        ({"epsilon": ".nan", "clip_norm": 1}, "--privacy.epsilon is nan"),
        ({"epsilon": "much", "clip_norm": 1}, "--privacy.epsilon is much; it must be a number"),
        ({**NOISE, "delta": 0}, "--privacy.delta is 0"),
        ({**NOISE, "delta": 1}, "--privacy.delta is 1"),
        ({"noise_multiplier": 1}, "--privacy.noise_multiplier without --privacy.clip_norm"),
        ({"epsilon": 1}, "--privacy.epsilon without --privacy.clip_norm"),
        ({"gradient_noise_multiplier": 1}, "without --privacy.gradient_clip_norm"),
        ({**NOISE, "epsilon": 1}, "leave out --privacy.noise_multiplier"),
        ({"clip_norm": 1, "noise_scale": 1}, "with --privacy.clip_norm use --privacy.noise_multiplier"),
        ({"clip_norm": -1}, "--privacy.clip_norm is -1"),
        ({"clip_norm": ".inf"}, "--privacy.clip_norm is not finite"),
        ({"unit": "word"}, "--privacy.unit is word; it must be one of token, example"),
        ({"label_protection": "yes"}, "--privacy.label_protection is yes; it must be one of none, max_norm"),
    ],
)
def test_bad_input_is_refused_in_one_line(flags: dict[str, Any], what: str) -> None:
    """By the command line's parser; every `BadInput` ends with exit code 2."""
    given = [word for name, value in flags.items() for word in (f"--privacy.{name}", str(value))]
    with pytest.raises(BadInput) as refused:
        parse_quickly(given)
    assert what in str(refused.value)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize("defence", [NOISE, {"noise_scale": 1.0}, {"clip_norm": 1.0}, {"label_protection": "max_norm"}])
def test_the_uncut_baseline_has_nothing_to_defend(defence: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing leaves a client"):
        Config(train=TrainConfig(schedule="centralised"), privacy=PrivacyConfig(**defence))
