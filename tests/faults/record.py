"""What a fault test has seen, for the table in docs/faults.md."""

from __future__ import annotations

import json
import os


def record(*, fault: str, goes_on: str, lost: str, message: str, noticed_s: float | None) -> None:
    """Append a row to the file that HPC_FAULTS_FILE names, if it is set.

    `noticed_s`: seconds from the fault to the end of the last role that it ends; None where it ends none.
    """
    path = os.environ.get("HPC_FAULTS_FILE")
    if path:
        row = {"fault": fault, "goes_on": goes_on, "lost": lost, "message": message, "noticed_s": noticed_s}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
