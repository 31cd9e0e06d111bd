"""A library's chatter is held back; when it fails, it is shown. In real processes: pytest replaces the streams."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CHATTER = """
import os, subprocess, sys
from hpc.quiet import quiet
print("first")
with quiet():
    print("python")
    os.write(2, b"descriptor")
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    {last}
print("after")
"""


def run(last: str) -> subprocess.CompletedProcess[str]:
    code = CHATTER.format(last=last)
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_nothing_is_said_when_all_goes_well() -> None:
    done = run("pass")
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\nafter\n", "")


def test_everything_is_said_on_failure() -> None:
    done = run("raise ValueError('broken')")
    assert done.returncode == 1
    assert done.stdout == "first\n"
    for word in ("python", "descriptor", "child", "ValueError: broken"):
        assert word in done.stderr
