"""A client's account of its releases: counts them before they happen, and stops before the budget is exceeded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpc.errors import BudgetSpent, CheckpointError
from hpc.privacy.defences.accounting import Mechanism, Plan, Releases
from hpc.privacy.defences.ledger import Ledger

_ROUNDING = 1 + 1e-9
RELEASED = "released_rows"  # key of a checkpoint's facts


class Account:
    """Of one client."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        mechanism: Mechanism,
        delta: float,
        plan: Plan,
        held_out_rows: int,
        epsilon: float | None = None,
        most_loss: float = math.inf,
    ) -> None:
        """`held_out_rows`: see `rows_of_held_out`; `epsilon` is the budget, and `most_loss` what it allows."""
        self._ledger, self.mechanism, self.delta, self.plan = ledger, mechanism, delta, plan
        self._held_out_rows, self._budget, self._most_loss = held_out_rows, epsilon, most_loss

    def training(self, step: int, rows: Sequence[int], sent: Sequence[int]) -> None:
        """Before `sent` of the training rows `rows` leave. Raises `BudgetSpent`."""
        for used in self._used_with(rows, sent):
            self._require_within(used, f"before step {step + 1}")
        self._ledger.training(step, rows, sent)

    def evaluation(self, step: int) -> None:
        """Before an evaluation. Raises `BudgetSpent`."""
        if self._held_out_rows:
            used = Releases(smashed=self._ledger.held_out + self._held_out_rows)
            self._require_within(used, f"before the evaluation after step {step}")
            self._ledger.evaluation(step, self._held_out_rows)

    @property
    def made(self) -> Releases:
        """Of the unit that was released most."""
        old = self._ledger
        seen = [Releases(smashed=old.smashed[row], gradients=count) for row, count in old.gradients.items()]
        return max([*seen, Releases(smashed=old.held_out)], key=self.mechanism.loss)

    @property
    def planned(self) -> Releases:
        """Of that unit in the whole run, if no step is repeated."""
        return max((self.plan.training, self.plan.held_out), key=self.mechanism.loss)

    def epsilon(self, releases: Releases) -> float:
        return self.mechanism.epsilon(releases, self.delta)

    def state(self) -> dict[str, float]:
        """For a checkpoint."""
        return {RELEASED: float(self._ledger.total)}

    def check(self, facts: Mapping[str, float]) -> None:
        """Raise `CheckpointError` unless the ledger has all that was released up to this checkpoint."""
        known = facts.get(RELEASED)
        if known is None or self._ledger.total < known:
            before = "without noise" if known is None else f"in {known:.0f} rows"
            raise CheckpointError(
                f"{self._ledger.path} counts {self._ledger.total} released rows, but up to this checkpoint the run "
                f"released its activations {before}; put the file back, or begin a new run in another --run.output_dir"
            )

    @property
    def is_limited(self) -> bool:
        """Whether there is a budget."""
        return math.isfinite(self._most_loss)

    def excess(self, rows: Sequence[int], sent: Sequence[int], *, evaluations: int) -> str:
        """Why the budget does not allow this batch, and to evaluate so often before it; empty if it does."""
        used = self._used_with(rows, sent)
        used += [Releases(smashed=self._ledger.held_out + evaluations * self._held_out_rows)] if evaluations else []
        beyond = [each for each in used if self._exceeds(each)]
        return self._words(beyond[0], "for what comes next") if beyond else ""

    def _used_with(self, rows: Sequence[int], sent: Sequence[int]) -> list[Releases]:
        """Of each of these training rows, when they will have left."""
        smashed, gradients = self._ledger.smashed, self._ledger.gradients
        return [
            Releases(smashed=smashed[row] + sent.count(row), gradients=gradients[row] + rows.count(row))
            for row in set(rows)
        ]

    def _require_within(self, used: Releases, when: str) -> None:
        if self._exceeds(used):
            raise BudgetSpent(f"{self._words(used, when)}. Checkpoints stay as they are")

    def _exceeds(self, used: Releases) -> bool:
        return self.mechanism.loss(used) > self._most_loss * _ROUNDING

    def _words(self, used: Releases, when: str) -> str:
        return (
            f"the privacy budget is used up {when}: one {self._unit} would have been released {used.smashed} times, "
            f"epsilon {self.epsilon(used):.4g} at delta {self.delta:g}, above --privacy.epsilon {self._budget:g}. "
            "Raise --privacy.epsilon, or stop at fewer --train.max_steps or evaluations"
        )

    @property
    def _unit(self) -> str:
        return "token row" if self.mechanism.rows == 1 else "example"

    def figures(self) -> dict[str, Any]:
        """For the events: what is promised for the whole run, and what has been released up to now."""
        planned, made = self.planned, self.made
        return {
            "delta": self.delta,
            "rows_of_unit": self.mechanism.rows,
            "releases_planned": planned.smashed,
            "epsilon_planned": self.epsilon(planned),
            "releases": made.smashed,
            "gradient_releases": made.gradients if self.mechanism.gradient_noise_multiplier else 0,
            "epsilon": self.epsilon(made),
            "budget": self._budget,
        }
