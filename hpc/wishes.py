"""What `launch/generate.py` is asked for. Pure: no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Literal, Optional

from hpc.errors import ConfigError, DataError
from hpc.rules import require, require_at_least


@dataclass(kw_only=True, frozen=True)
class Wishes:
    """How prompts are continued; the names and meanings are those of transformers' `generate`."""

    max_new_tokens: int = 64
    """Longest continuation (tokens); it ends earlier at the model's end-of-text token."""
    do_sample: bool = False
    """Draw each token; otherwise the likeliest one is taken."""
    temperature: float = 1.0
    """With do_sample: below 1 the likely tokens become likelier."""
    top_k: int = 50
    """With do_sample: draw from so many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """With do_sample: draw from the likeliest tokens that together have this probability."""
    num_beams: int = 1
    """Beam search with so many beams; 1: none."""
    seed: int = 0
    """With do_sample: the same seed draws the same text."""
    stop: List[str] = field(default_factory=list)
    """End where one of these texts appears."""
    chat: bool = False
    """Put each prompt into the model's chat template, as a user's message."""
    prompt_file: Optional[str] = None
    """File with a prompt on each line; `{client_id}` in its name gives each client its own."""
    run_folder: Optional[str] = None
    """Output folder of a run: its configuration, and what it trained."""
    source: Literal["auto", "adapter", "checkpoint"] = "auto"
    """What of the run: the adapter written at its end, or its last whole checkpoint; `auto`: whichever is here."""
    client: int = 0
    """Which client of the run this is, where one process asks."""

    def __post_init__(self) -> None:
        require_at_least("max_new_tokens", self.max_new_tokens, 1)
        require_at_least("num_beams", self.num_beams, 1)
        require_at_least("top_k", self.top_k, 0)
        require_at_least("client", self.client, 0)
        require(0 <= self.seed < 2**32, f"--seed is {self.seed}; it must be 0 to 4294967295")
        require(self.temperature > 0, f"--temperature is {self.temperature}; it must be above 0")
        require(0 < self.top_p <= 1, f"--top_p is {self.top_p}; it must be above 0 and at most 1")
        drawn = (self.temperature, self.top_k, self.top_p) == (1.0, 50, 1.0)
        require(self.do_sample or drawn, "--temperature, --top_k and --top_p need --do_sample true")

    def arguments(self) -> dict[str, Any]:
        """For `generate`."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.do_sample}
        chosen |= {"num_beams": self.num_beams}
        if self.do_sample:
            chosen |= {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return chosen | ({"stop_strings": list(self.stop)} if self.stop else {})


def require_prompts(given: Sequence[str] | None, wishes: Wishes) -> None:
    """Raise `ConfigError` unless prompts come from exactly one place: every rank knows that, also one without any."""
    if bool(given) == bool(wishes.prompt_file):
        raise ConfigError("give either --prompt TEXT [TEXT ...] or --prompt_file FILE")


def prompts_of(given: Sequence[str] | None, wishes: Wishes, client: int) -> list[str]:
    """The prompts of one client. Raises `ConfigError` for none, `DataError` for a file that cannot be read."""
    require_prompts(given, wishes)
    prompts = list(given or [])
    if wishes.prompt_file:
        path = Path(wishes.prompt_file.replace("{client_id}", str(client)))
        try:
            prompts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--prompt_file {path} cannot be read: {error}") from None
    if not all(prompt.strip() for prompt in prompts) or not prompts:
        raise ConfigError("a prompt is empty; give it some text")
    return prompts
