"""What a run does for privacy: noise and its budget, and recordings for attacks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from hpc.rules import require_at_least


@dataclass(kw_only=True, frozen=True)
class PrivacyConfig:
    """What the server may learn, and what is recorded of it."""

    record_steps: int = 0
    """Of the first so many steps, each trunk rank keeps what it receives, and each client what was true, in
    recordings/ of the run's folder, for launch/attack.py. These files hold private text."""

    def __post_init__(self) -> None:
        require_at_least("privacy.record_steps", self.record_steps, 0)
