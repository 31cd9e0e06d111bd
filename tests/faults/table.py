"""docs/faults.md, from what the fault tests have seen.

`python -m tests.faults.table SEEN.jsonl` takes up the rows that `HPC_FAULTS_FILE=SEEN.jsonl pytest tests/faults` left
and writes results/raw/faults.json; without a file it only renders again. `make faults` does both.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from hpc.bench.markdown import shown, table
from hpc.report.provenance import git_commit, machine, versions
from hpc.report.summary import write_json_atomic

ROOT = Path(__file__).resolve().parents[2]
RAW, PAGE = ROOT / "results" / "raw" / "faults.json", ROOT / "docs" / "faults.md"

INTRODUCTION = """# Faults: what breaks, what goes on, what is lost

Made by `make faults` from the tests in tests/faults, which break runs of real processes: never edit it by hand.

The runs are small (a random 4-block Llama, 2 or 3 clients, 1 or 2 trunk ranks) and allowed to spare clients
(`--train.min_clients 1`) where a row says that others go on. With `--train.min_clients 0`, the default, the run needs
every client and ends with the first that is lost; it then goes on from its last checkpoint
(`--run.resume_from_checkpoint latest`), bit for bit as if it had not ended.

A closed connection is noticed at once, silence after `--link.timeout_s`. Nobody waits without a deadline. A client that
comes back (the same command again, or `--run.client_restarts`, or `launch/join.py`) takes part from the next step on,
or after the next average where parameters are averaged. What the others have learned meanwhile one of them gives it,
sealed end to end: the trunk passes on what it cannot read. Where each client keeps its own parts
(`--train.aggregation none`), it goes on from its own last checkpoint.

MPI ends a whole job with any of its processes, so nothing of this holds for `--link.transport mpi`; and torchrun ends
all of its processes when one fails. Start roles one by one (`sbatch slurm/train.sh`, `launch/local.py`) where clients
are to be spared.
"""


def take_up(seen: Path) -> dict[str, Any]:
    """The rows, and where they come from."""
    rows = [json.loads(line) for line in seen.read_text(encoding="utf-8").splitlines()]
    return {
        "command": "make faults",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "git_commit": git_commit(),
        "machine": machine(),
        "versions": versions(),
        "rows": [{name: _anywhere(value) for name, value in row.items()} for row in rows],
    }


def _anywhere(value: Any) -> Any:
    """Without this machine's ports and temporary folders."""
    if not isinstance(value, str):
        return value
    return re.sub(r"(\d+\.\d+\.\d+\.\d+):\d+", r"\1:<port>", re.sub(r"/\S*/", "…/", value))


def page(raw: dict[str, Any]) -> str:
    rows = [
        [
            row["fault"],
            row["goes_on"],
            row["lost"],
            f"`{row['message'].replace('|', '/')}`",
            shown(row["noticed_s"], ".1f", " s"),
        ]
        for row in raw["rows"]
    ]
    columns = ["fault", "what goes on", "what is lost", "what is said", "noticed after"]
    about, found = raw["machine"], raw["versions"]
    footer = (
        f"Seen on {raw['date']} on {about['cpu']} ({about['cores']} cores), Python {found['python']}, torch "
        f'{found["torch"]}, at commit {raw["git_commit"]}. "Noticed after" is the time from the fault to the trunk\'s '
        "event or to the end of the last role that it ends; the time of a return includes the client's own start."
    )
    return "\n".join([INTRODUCTION, table(columns, rows, words=4), "", footer, ""])


def main(arguments: list[str]) -> None:
    if arguments:
        write_json_atomic(RAW, take_up(Path(arguments[0])))
    draft = PAGE.with_name(f".{PAGE.name}.{os.getpid()}")
    draft.write_text(page(json.loads(RAW.read_text(encoding="utf-8"))), encoding="utf-8")
    draft.replace(PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
