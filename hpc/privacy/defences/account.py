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
        old = self._ledger
        for row in set(rows):
            used = Releases(smashed=old.smashed[row] + sent.count(row), gradients=old.gradients[row] + rows.count(row))
            self._require_within(used, f"step {step + 1}")
        old.training(step, rows, sent)

    def evaluation(self, step: int) -> None:
        """Before an evaluation. Raises `BudgetSpent`."""
        if self._held_out_rows:
            used = Releases(smashed=self._ledger.held_out + self._held_out_rows)
            self._require_within(used, f"the evaluation after step {step}")
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

    def _require_within(self, used: Releases, what: str) -> None:
        if self.mechanism.loss(used) <= self._most_loss * _ROUNDING:
            return
        raise BudgetSpent(
            f"the privacy budget is used up before {what}: one {self._unit} would have been released {used.smashed} "
            f"times, epsilon {self.epsilon(used):.4g} at delta {self.delta:g}, above --privacy.epsilon "
            f"{self._budget:g}; the last checkpoint stays. Raise --privacy.epsilon, or stop at fewer "
            "--train.max_steps or evaluations"
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
