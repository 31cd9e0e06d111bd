"""The attack command as a user types it: it makes the run, records it, and recovers what was sent at cut 0."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.runs import ROOT, TINY, run_command

ATTACK = [sys.executable, str(ROOT / "launch" / "attack.py")]


def test_a_recipe_is_run_recorded_and_attacked(tmp_path: Path, run_keys: Path) -> None:
    folder = tmp_path / "run"
    own = ["--run.output_dir", str(folder), "--link.keys_dir", str(run_keys), "--data.val_examples", "0"]
    run = ["--model.head_blocks", "0", "--train.max_steps", "2"]
    attack = ["--attack.method", "nearest_embedding", "--attack.max_rows", "8"]
    done = run_command([*ATTACK, *TINY, *own, *run, *attack], folder)
    assert done.code == 0, done.err[-3000:]
    assert "token_accuracy" in done.out
    document = json.loads((folder / "attack-nearest_embedding.json").read_text())
    accuracy = document["scores"]["token_accuracy"]
    assert accuracy["attack"]["low"] >= 99
    assert all(floor["high"] < 50 for floor in accuracy["floors"].values())
    refused = run_command([*ATTACK, "--attack.run_folder", str(folder), "--attack.victim", "3"], folder)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "none of 3" in refused.err
