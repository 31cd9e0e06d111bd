"""What the noise promises: epsilon over all releases of a unit. Pure.

What is protected. A release is one token row, clipped to the norm C, with noise of standard deviation sigma * C, as it
leaves the client. Any other row in its place differs by at most 2 C, so a release is a Gaussian mechanism of
sensitivity 2 C.

- unit `token`: one row of the smashed matrix at one place of one example. Whoever sees this row's releases cannot tell
  well which of any two vectors it was. In a causal model later rows depend on the same token, so this promises nothing
  about a token of the text given the whole matrix.
- unit `example`: all rows of an example of at most T tokens, which together change by at most 2 C sqrt(T): the promise
  for one example of the client's own file against any other text of the same length.

What is not protected: row lengths and numbers of label tokens; gradients that go back, unless these are noised too
(then they are counted in); what the client parts learn, where their gradients or values go to the server, and the norm
of their gradient; with client heads that learn, what the rows of other examples tell through the changed weights; a
text that is in the data twice (each copy is a unit of its own, as are held-out examples). No amplification by sampling
is claimed: the server knows which examples are in which step.

The composition over releases is dp_accounting's, by privacy loss distributions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc.config import Config, PrivacyConfig, TrainConfig
from hpc.data.dataset import ClientData, EvalBatch
from hpc.schedule import Evaluate, TrainStep, instructions

if TYPE_CHECKING:
    from dp_accounting import DpEvent

_GRID = 1e-4  # of the losses' distribution, as a share of epsilon: accurate to some 1e-6 of it
_TOLERANCE = 1e-5


@dataclass(kw_only=True, frozen=True)
class Releases:
    """How often each row of one unit leaves the client."""

    smashed: int = 0
    gradients: int = 0
    """Of these only what is noised is counted."""


@dataclass(kw_only=True, frozen=True)
class Mechanism:
    """What a release is made with."""

    rows: int
    """Token rows that change when one unit is replaced."""
    noise_multiplier: float
    """Standard deviation of the noise on smashed activations / clip norm."""
    gradient_noise_multiplier: float = 0.0
    """The same of the gradient that goes back; 0: it is not noised, and not covered."""

    def loss(self, releases: Releases) -> float:
        """Squared sensitivity over variance, summed over the releases: all that a sum of Gaussian mechanisms depends on
        (mu² of Gaussian differential privacy; Dong, Roth and Su, 2019)."""
        of_smashed = releases.smashed / self.noise_multiplier**2 if releases.smashed else 0.0
        noised = releases.gradients and self.gradient_noise_multiplier
        of_gradients = releases.gradients / self.gradient_noise_multiplier**2 if noised else 0.0
        return 4 * self.rows * (of_smashed + of_gradients)

    def event(self, releases: Releases) -> DpEvent:
        """The same for dp_accounting, whose noise multiplier is standard deviation over sensitivity."""
        from dp_accounting import ComposedDpEvent, GaussianDpEvent, SelfComposedDpEvent

        counts = [(self.noise_multiplier, releases.smashed)]
        counts += [(self.gradient_noise_multiplier, releases.gradients)] if self.gradient_noise_multiplier else []
        sensitivity = 2 * math.sqrt(self.rows)
        return ComposedDpEvent(
            [SelfComposedDpEvent(GaussianDpEvent(noise / sensitivity), count) for noise, count in counts if count]
        )

    def epsilon(self, releases: Releases, delta: float) -> float:
        """Of one unit after these releases."""
        loss = self.loss(releases)
        if not loss:
            return 0.0
        accountant = _accountant(loss, delta)
        accountant.compose(self.event(releases))
        return float(accountant.get_epsilon(delta))


def _accountant(loss: float, delta: float) -> Any:
    from dp_accounting.pld import PLDAccountant

    return PLDAccountant(value_discretization_interval=_GRID * _bound(loss, delta))


def _bound(loss: float, delta: float) -> float:
    """An epsilon that is never too small for a Gaussian mechanism (by Rényi divergences; Mironov, 2017)."""
    return loss / 2 + math.sqrt(2 * loss * math.log(1 / delta))


def most_loss(epsilon: float, delta: float) -> float:
    """The greatest `Mechanism.loss` that a budget allows."""
    from dp_accounting import ExplicitBracketInterval, GaussianDpEvent, calibrate_dp_mechanism

    root = math.sqrt(math.log(1 / delta))
    high = 1 / (math.sqrt(2) * (math.sqrt(root**2 + epsilon) - root))  # noise that is enough by `_bound`

    def reached(noise: float) -> float:
        accountant = _accountant(noise**-2, delta)
        accountant.compose(GaussianDpEvent(noise))
        return float(accountant.get_epsilon(delta))

    low = high / 2
    while reached(low) <= epsilon:
        low /= 2
    noise = calibrate_dp_mechanism(
        lambda: _accountant(low**-2, delta),
        GaussianDpEvent,
        target_epsilon=epsilon,
        target_delta=delta,
        bracket_interval=ExplicitBracketInterval(low, high),
        tol=_TOLERANCE * low,
    )
    return float(noise) ** -2


def multiplier_for(most: float, *, rows: int, releases: Releases, gradients: bool) -> float:
    """The noise multiplier, one for both, with which these releases come to a `loss` of `most`."""
    return math.sqrt(4 * rows * (releases.smashed + (releases.gradients if gradients else 0)) / most)


@dataclass(kw_only=True, frozen=True)
class Plan:
    """Releases that a whole run makes of the training example, and of the held-out example, that it uses most."""

    training: Releases
    held_out: Releases

    def worst(self, *, gradients: bool) -> Releases:
        """`gradients`: whether they count."""
        return max((self.training, self.held_out), key=lambda each: each.smashed + gradients * each.gradients)


def plan(config: Config, data: ClientData, *, held_out_rows: int) -> Plan:
    """`held_out_rows`: see `rows_of_held_out`. An upper bound where the server's cache spares releases."""
    batches, evaluations = uses(config.train, data.client_id, evaluate=config.data.evaluates)
    often = -(-batches * config.train.per_client_batch_size // len(data.train_rows))
    return Plan(
        training=Releases(smashed=often, gradients=often), held_out=Releases(smashed=evaluations * held_out_rows)
    )


def uses(train: TrainConfig, client: int, *, evaluate: bool) -> tuple[int, int]:
    """Batches that the client trains on in the whole run, and its evaluations."""
    batches = evaluations = 0
    for instruction in instructions(train, evaluate=evaluate):
        batches += isinstance(instruction, TrainStep) and client in instruction.clients
        evaluations += isinstance(instruction, Evaluate)
    return batches, evaluations


def rows_of_held_out(batches: Sequence[EvalBatch], *, decodes: bool) -> int:
    """How often one evaluation sends the rows of one example's prompt: with each of its choices, and to be decoded."""
    scored = [1 if batch.choice_ids_EC is not None else max(batch.choices) for batch in batches]
    return max(scored) + decodes if scored else 0


def rows_of_unit(config: PrivacyConfig, data: ClientData, *, longest_answer: int) -> int:
    """Token rows that change when one unit is replaced; `longest_answer` (tokens) is decoded behind a held-out prompt,
    at most."""
    if config.unit == "token":
        return 1
    scored = (len(item.prompt) + max(map(len, item.choices), default=0) for item in data.val_items)
    decoded = (len(item.prompt) + longest_answer for item in data.val_items)
    return max([*(len(row.ids) for row in data.train_rows), *scored, *decoded])
