"""What came of an attack, as a value, as JSON and as a table. No text of anybody is in it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpc.config import Config
from hpc.files import drafted
from hpc.privacy.attack_config import AttackConfig
from hpc.privacy.scores.interval import Interval, Score
from hpc.report.provenance import git_commit, machine, versions, without_folders


@dataclass(kw_only=True, frozen=True)
class AttackResult:
    """One attack on one run."""

    method: str
    options: AttackConfig
    config: Config
    """Of the run."""
    rows: int
    """Of the victim, attacked."""
    tokens: int
    shadow_rows: int
    steps: tuple[int, int]
    """First and last step whose batches were attacked, from 0."""
    seconds: float
    """Of the attack alone."""
    scores: dict[str, Score]
    figures: dict[str, float]
    """What the method tells besides."""

    def document(self) -> dict[str, Any]:
        """With where it comes from, and without this machine's folders."""
        plain: dict[str, Any] = _without_folders(asdict(self))
        about = {"versions": versions(), "machine": machine(), "git_commit": git_commit()}
        return {**plain, **about, "command": [without_folders(word) for word in sys.argv]}

    def write(self, folder: Path) -> Path:
        """`attack-<method>.json`, whole or not there."""
        path = folder / f"attack-{self.method}.json"
        with drafted(path) as draft:
            draft.write_text(json.dumps(self.document(), indent=1) + "\n", encoding="utf-8")
        return path

    def as_text(self) -> str:
        """A line for each score: the attack with its interval, and its floors."""
        floors = list(dict.fromkeys(name for score in self.scores.values() for name in score.floors))
        lines = [["score, percent", self.method, "95 %", *floors]]
        for name, score in self.scores.items():
            columns = [_value(score.floors.get(floor)) for floor in floors]
            lines.append([name, _value(score.attack), f"{score.attack.low:.1f} – {score.attack.high:.1f}", *columns])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(_justified(line, widths)) for line in lines]
        extra = [f"{name}: {value:.6g}" for name, value in self.figures.items()]
        return "\n".join([self._headline(), *table, *extra])

    def _headline(self) -> str:
        model = self.config.model
        steps = " to ".join(dict.fromkeys(str(step) for step in self.steps))
        return (
            f"{self.method} on client {self.options.victim}: {self.rows} rows, {self.tokens} tokens of step {steps}; "
            f"{model.name_or_path}, head of {model.head_blocks} blocks; {self.seconds:.1f} s"
        )


def _value(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.value:.1f}"


def _justified(line: list[str], widths: list[int]) -> list[str]:
    return [
        text.rjust(width) if place else text.ljust(width)
        for place, (text, width) in enumerate(zip(line, widths, strict=True))
    ]


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_folders(each) for each in value]
    return without_folders(value) if isinstance(value, str) else value
