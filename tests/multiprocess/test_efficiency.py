"""`launch/reproduce.py efficiency` in real processes: on this machine, and on two hosts joined by a cable."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hpc.bench import results
from hpc.bench.efficiency import SUITE
from tests.netns import why_not
from tests.runs import ROOT, clean_environment

PRESET = """
scale: a trial
seeds: [0]
models: {}
adapters: {}
tasks: {}
tables: {}
efficiency: {turns: 1, clients: 1, flags: {model.name_or_path: tiny-llama, data.train_examples: 8}}
"""
STEPS = 8 * 3 + 1  # eight samples in each of three turns, and the step behind the last


@pytest.mark.long
@pytest.mark.timeout(300)
def test_time_is_measured_on_one_host_and_on_two(tmp_path: Path) -> None:
    (tmp_path / "trial.yaml").write_text(PRESET)
    flags = ["--preset", str(tmp_path / "trial.yaml"), "--results_dir", str(tmp_path / "results")]
    command = [sys.executable, str(ROOT / "launch" / "reproduce.py"), "efficiency", *flags]
    before = set(Path("/run/netns").glob("hpc-*"))
    process = subprocess.Popen(
        command, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        out, _ = process.communicate(timeout=240)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # it ends what it has started
            process.wait(40)
    assert process.returncode == 0, out
    raw = results.load(tmp_path / "results" / "raw" / "bench-efficiency-trial.json")
    rows = {row["name"]: row for row in SUITE.figures(raw["measured"])["rows"]}
    assert (tmp_path / "results" / "tables" / "bench-efficiency-trial.md").read_text() == SUITE.table(raw)
    assert (tmp_path / "results" / "figures" / "bench-efficiency-trial.png").exists()
    assert str(tmp_path) not in json.dumps(raw)
    cable = raw["measured"]["cable"]
    if reason := why_not():
        assert cable["left_out"] == reason
        assert list(rows) == ["centralised", "one_host"]
        return
    assert list(rows) == ["centralised", "one_host", "two_hosts"]
    assert rows["two_hosts"]["payload_bytes_per_step"] == rows["one_host"]["payload_bytes_per_step"]
    assert 0 < cable["found_bytes_per_second"] < 1.05 * cable["asked_bytes_per_second"]
    payload = STEPS * rows["two_hosts"]["payload_bytes_per_step"]
    assert payload < cable["carried_bytes"] < 1.5 * payload, "the links took the cable, and nothing else did"
    assert set(Path("/run/netns").glob("hpc-*")) <= before, "no namespace stays behind"
