"""A client's shield, from the configuration, its data, and what it has released before."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hpc.config import Config, PrivacyConfig
from hpc.data.dataset import ClientData
from hpc.errors import CheckpointError, ConfigError
from hpc.privacy.defences.account import Account
from hpc.privacy.defences.accounting import (
    Mechanism,
    Plan,
    most_loss,
    multiplier_for,
    plan,
    rows_of_held_out,
    rows_of_unit,
)
from hpc.privacy.defences.ledger import FILE_NAME, Ledger
from hpc.privacy.defences.shield import Shield
from hpc.report.events import role_path


def ledger_path(folder: str | Path, client_id: int) -> Path:
    return role_path(folder, f"client-{client_id}").with_name(FILE_NAME)


def shield_for(config: Config, data: ClientData, folder: Path) -> Shield:
    """Raises `CheckpointError` if the run in `folder` has released anything under other settings."""
    privacy, path = config.privacy, ledger_path(folder, data.client_id)
    if not privacy.accounted:
        if path.exists():
            raise CheckpointError(
                f"{path} counts what this run released with noise, but now --privacy asks for none; give the same "
                "settings, or another --run.output_dir"
            )
        return Shield(privacy)
    decodes = config.data.decodes
    batches = data.eval_batches(config.train.eval_batch_size) if config.data.evaluates else []
    held_out_rows = rows_of_held_out(batches, decodes=decodes)
    rows = rows_of_unit(privacy, data, longest_answer=_longest_answer(config, data) if decodes else 0)
    planned, ledger = plan(config, data, held_out_rows=held_out_rows), Ledger(path)
    most = math.inf if privacy.epsilon is None else most_loss(privacy.epsilon, privacy.delta)
    shield = Shield(privacy, noise_multiplier=_worked_out(privacy, ledger, planned, rows=rows, most=most))
    mechanism = Mechanism(
        rows=rows,
        noise_multiplier=shield.noise_multiplier,
        gradient_noise_multiplier=shield.gradient_noise_multiplier,
    )
    ledger.begin(_lasting(shield, rows=rows, examples=len(data.train_rows)))
    shield.account = Account(
        ledger=ledger,
        mechanism=mechanism,
        delta=privacy.delta,
        plan=planned,
        held_out_rows=held_out_rows,
        epsilon=privacy.epsilon,
        most_loss=most,
    )
    return shield


def shield_to_generate(config: Config, folder: str | None, client_id: int) -> Shield:
    """For prompts, which are no examples of the run: they are on no account.

    Raises `ConfigError` for an epsilon where no run says which noise multiplier it came to.
    """
    privacy = config.privacy
    if privacy.epsilon is None:
        return Shield(privacy)
    settings = Ledger(ledger_path(folder, client_id)).settings if folder is not None else None
    if settings is None:
        raise ConfigError(
            "--privacy.epsilon is a run's budget: give the --run_folder of one, in which this client's ledger says "
            "what noise it came to, or --privacy.noise_multiplier instead"
        )
    return Shield(privacy, noise_multiplier=float(settings["noise_multiplier"]))


def _worked_out(privacy: PrivacyConfig, ledger: Ledger, planned: Plan, *, rows: int, most: float) -> float | None:
    """The noise multiplier that `epsilon` comes to: at the first start of the run, and for good."""
    if privacy.epsilon is None:
        return None
    if ledger.settings is not None:
        return float(ledger.settings["noise_multiplier"])
    gradients = privacy.gradient_clip_norm > 0
    return multiplier_for(most, rows=rows, releases=planned.worst(gradients=gradients), gradients=gradients)


def _longest_answer(config: Config, data: ClientData) -> int:
    """Most tokens that an evaluation decodes behind a prompt (`hpc.matches`)."""
    return max([config.data.max_target_length, *(len(ids) for item in data.val_items for ids in item.choices)])


def _lasting(shield: Shield, *, rows: int, examples: int) -> dict[str, Any]:
    """What a run may not change once it has released anything."""
    return {
        "unit": shield.config.unit,
        "rows_of_unit": rows,
        "examples": examples,
        "clip_norm": shield.config.clip_norm,
        "noise_multiplier": shield.noise_multiplier,
        "gradient_clip_norm": shield.config.gradient_clip_norm,
        "gradient_noise_multiplier": shield.gradient_noise_multiplier,
        "label_protection": shield.config.label_protection,
        "delta": shield.config.delta,
    }
