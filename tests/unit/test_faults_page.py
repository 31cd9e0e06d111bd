"""docs/faults.md is what the fault tests saw, not what somebody typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.faults import table


def test_the_page_is_made_from_the_committed_rows() -> None:
    if not table.RAW.exists():
        pytest.skip("make faults has not been run yet")
    assert table.PAGE.read_text(encoding="utf-8") == table.page(json.loads(table.RAW.read_text(encoding="utf-8")))


def test_nothing_of_this_machine_gets_into_it(tmp_path: Path) -> None:
    seen = tmp_path / "seen.jsonl"
    message = f"nobody at 127.0.0.1:45123 writes {tmp_path}/run/metrics.jsonl"
    row = {"fault": "a | b", "goes_on": "c", "lost": "d", "message": message, "noticed_s": 1.25}
    seen.write_text(json.dumps(row) + "\n")
    raw = table.take_up(seen)
    assert raw["rows"][0]["message"] == "nobody at 127.0.0.1:<port> writes …/metrics.jsonl"
    assert "1.2 s" in table.page(raw)
