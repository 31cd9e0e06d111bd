"""Not to be called by hand: the process from which a run on one machine forks its roles (see `hpc.nursery`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hpc.cli import run_main
from hpc.nursery import main

if __name__ == "__main__":
    run_main(main)
