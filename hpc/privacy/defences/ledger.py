"""What a client has released so far: a file that only grows, in the client's own folder.

`<run folder>/roles/client-<k>/privacy.jsonl`: the settings, then a line before each release. A run that is killed and
taken up again repeats steps; the file then has those releases twice, as the server has.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.errors import CheckpointError

FILE_NAME = "privacy.jsonl"
Settings = Mapping[str, Any]


class Ledger:
    """Counts releases, by training row and for held-out examples together."""

    def __init__(self, path: Path) -> None:
        """Takes up what the file has. Raises `CheckpointError` if it cannot be read."""
        self.path = path
        self.settings: Settings | None = None
        self.smashed: Counter[int] = Counter()
        self.gradients: Counter[int] = Counter()
        self.held_out = 0
        for line in self._lines():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise CheckpointError(
                    f"{path} is broken at {line[:40]!r}, so what was released is not known; begin a new run in another "
                    "--run.output_dir"
                ) from None

    @property
    def total(self) -> int:
        """Of all rows: a number that only grows."""
        return self.smashed.total() + self.held_out

    def begin(self, settings: Settings) -> None:
        """The first process of the run writes the settings; later ones must have the same.

        Raises `CheckpointError` that names both values of what differs.
        """
        if self.settings is None:
            self._write({"settings": dict(settings)})
        differing = [key for key in settings if settings[key] != (self.settings or settings).get(key)]
        if differing:
            told = "; ".join(f"{key}: then {(self.settings or {}).get(key)}, now {settings[key]}" for key in differing)
            raise CheckpointError(
                f"{self.path} counts releases with other settings ({told}); give the same, or another "
                "--run.output_dir, where the count begins anew"
            )

    def training(self, step: int, rows: Sequence[int], sent: Sequence[int]) -> None:
        """Before `sent` of the training rows `rows` leave; the gradient of all of them follows."""
        self._write({"step": step, "rows": list(rows), **({} if sent == rows else {"sent": list(sent)})})

    def evaluation(self, step: int, times: int) -> None:
        """Before each held-out example leaves `times` times."""
        self._write({"step": step, "held_out": times})

    def _lines(self) -> list[bytes]:
        """Whole ones. A last one that was cut was not yet followed by its release."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror})") from None
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return whole.splitlines()

    def _write(self, line: dict[str, Any]) -> None:
        """On disc before it returns: what is not counted must not leave."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}), and what cannot be counted is not released"
            ) from None
        self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        if "settings" in line:
            self.settings = line["settings"]
        elif "held_out" in line:
            self.held_out += int(line["held_out"])
        else:
            self.gradients.update(line["rows"])
            self.smashed.update(line.get("sent", line["rows"]))
