"""The `train` group of the configuration: schedule, length, optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpc.rules import require, require_at_least

MAX_ROWS = 192  # rows whose lengths fit into one frame header (hpc.link.frame)

ScheduleName = Literal["centralised", "serial", "client_batch", "pipelined", "replica"]
AggregationName = Literal["auto", "none", "handover", "gradient", "fedavg"]
# The first is what `auto` means.
_FITTING_AGGREGATION = {
    "centralised": ("gradient",),
    "serial": ("handover", "none"),
    "client_batch": ("gradient", "fedavg", "none"),
    "pipelined": ("gradient", "fedavg", "none"),
    "replica": ("fedavg", "none"),
}
# Where a step needs no particular client: the others can go on without one.
_SPARES_CLIENTS = ("client_batch", "pipelined", "replica")


@dataclass(kw_only=True, frozen=True)
class TrainConfig:
    """Schedule, length and optimiser."""

    schedule: ScheduleName = "client_batch"
    """Order of work in a round: `client_batch` (the trunk works on all clients' rows as one batch), `pipelined` (micro-
    batches, first come first served), `replica` (each client trains trunk values of its own over one frozen base),
    `serial` (client by client); `centralised` is the uncut baseline in one process."""
    clients: int = 2
    """Number of clients."""
    clients_per_round: int = 0
    """Clients drawn for each round of `sync_every` steps; 0: all."""
    min_clients: int = 0
    """Go on when clients are lost, as long as so many are left (not in `serial`); 0: the run needs every client."""
    max_steps: int = 0
    """Optimiser steps of the trunk; 0: `rounds` decides, or 100 if that is 0 too."""
    rounds: int = 0
    """Rounds instead of steps. In a round each of its clients contributes `sync_every` batches."""
    per_client_batch_size: int = 4
    """Examples of one client in one batch."""
    micro_batches: int = 0
    """`pipelined`: pieces of one client's batch; 0: two, or one where a batch has a single row."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_scheduler: Literal["linear", "constant"] = "linear"
    """After the warm-up: down to 0 at the last step, or constant."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's decay of the first moment."""
    adam_beta2: float = 0.999
    """AdamW's decay of the second moment."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this global norm over all three parts; 0: do not clip."""
    sync_every: int = 1
    """Local steps of a round: before parts are averaged (`fedavg`), handed on (`handover`), or other clients drawn."""
    aggregation: AggregationName = "auto"
    """What becomes of the client parts: `gradient` sums their gradients each step, `fedavg` averages parameters every
    `sync_every` steps (weighted by examples), `handover` passes them on (serial), `none` lets each client keep its
    own; `auto` picks the schedule's own. In `replica` the trunk's replicas are averaged in any case."""
    secure_aggregation: bool = False
    """Hide single contributions to `gradient` or `fedavg` from the server: under pairwise masks it learns their sum."""
    order: Literal["union", "sequential"] = "union"
    """`centralised`: the clients' batches as one step, or client by client."""
    eval_every: int = 0
    """Evaluate every so many steps; 0: before and after training only."""
    eval_before: bool = True
    """Evaluate before the first step, too."""
    early_stopping_patience: int = 0
    """Stop when so many evaluations in a row brought more than half of the clients no lower held-out loss; 0: never.
    Each client tells only whether it would stop, never its loss."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss, gradient or activation is NaN or infinite: end the run, or leave that step out. Nobody steps."""
    save_every: int = 0
    """Write a checkpoint every so many steps; 0: none. Where that fails (disc full), the run goes on without it."""
    save_total_limit: int = 0
    """Checkpoints to keep: after each new one the oldest beyond this number are removed; 0: keep all."""
    eval_batch_size: int = 16
    """Rows of one client in one evaluation batch."""
    seed: int = 0
    """Seed of data, order, adapters and dropout."""

    def __post_init__(self) -> None:
        for name in ("clients", "per_client_batch_size", "eval_batch_size", "sync_every"):
            require_at_least(f"train.{name}", getattr(self, name), 1)
        for name in (
            "max_steps",
            "rounds",
            "clients_per_round",
            "min_clients",
            "micro_batches",
            "early_stopping_patience",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "adam_epsilon",
            "eval_every",
            "save_every",
            "save_total_limit",
            "seed",
        ):
            require_at_least(f"train.{name}", getattr(self, name), 0)
        require(self.learning_rate > 0, f"--train.learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("per_client_batch_size", "eval_batch_size"):
            rows = getattr(self, name)
            require(rows <= MAX_ROWS, f"--train.{name} is {rows}; a frame carries at most {MAX_ROWS} rows")
        require(
            self.max_steps == 0 or self.rounds == 0,
            f"--train.max_steps {self.max_steps} and --train.rounds {self.rounds} both say how long; give one of them",
        )
        for name in ("adam_beta1", "adam_beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--train.{name} is {value}; it must be in [0, 1)")
        self._check_schedule()
        self._check_clients()

    def _check_schedule(self) -> None:
        fitting = _FITTING_AGGREGATION[self.schedule]
        require(
            self.aggregation == "auto" or self.aggregation in fitting,
            f"--train.aggregation {self.aggregation} does not fit --train.schedule {self.schedule}; "
            f"use {' or '.join(fitting)}",
        )
        require(
            self.schedule == "pipelined" or self.micro_batches <= 1,
            f"--train.micro_batches {self.micro_batches} is for --train.schedule pipelined, not {self.schedule}",
        )
        require(
            self.micro_batches <= self.per_client_batch_size,
            f"--train.micro_batches {self.micro_batches} exceeds --train.per_client_batch_size "
            f"{self.per_client_batch_size}: a micro-batch needs a row",
        )
        require(
            self.early_stopping_patience == 0 or self.eval_every > 0,
            f"--train.early_stopping_patience {self.early_stopping_patience} needs evaluations on the way; "
            "give --train.eval_every",
        )
        require(
            self.early_stopping_patience == 0 or not self.averages or self.eval_every % self.sync_every == 0,
            f"--train.early_stopping_patience would stop between two averages: make --train.eval_every "
            f"{self.eval_every} a multiple of --train.sync_every {self.sync_every}",
        )

    def _check_clients(self) -> None:
        require(
            self.clients_per_round <= self.clients,
            f"--train.clients_per_round {self.clients_per_round} exceeds --train.clients {self.clients}; lower it",
        )
        require(
            self.min_clients <= self.cohort_size,
            f"--train.min_clients {self.min_clients} exceeds the {self.cohort_size} clients of a round; lower it",
        )
        require(
            self.min_clients == 0 or self.schedule in _SPARES_CLIENTS,
            f"--train.min_clients does not work with --train.schedule {self.schedule}, which needs every client; "
            f"use {', '.join(_SPARES_CLIENTS)}",
        )
        if not self.secure_aggregation:
            return
        require(
            self.schedule in _SPARES_CLIENTS and self.resolved_aggregation in ("gradient", "fedavg"),
            f"--train.secure_aggregation hides what `gradient` or `fedavg` sums; --train.schedule {self.schedule} with "
            f"--train.aggregation {self.resolved_aggregation} sums nothing",
        )
        require(
            self.cohort_size >= 2,
            f"--train.secure_aggregation with {self.cohort_size} client in a round: a sum of one hides nothing; "
            "use at least 2",
        )

    @property
    def resolved_aggregation(self) -> str:
        """`aggregation` with `auto` replaced by the schedule's own."""
        return _FITTING_AGGREGATION[self.schedule][0] if self.aggregation == "auto" else self.aggregation

    @property
    def resolved_micro_batches(self) -> int:
        """Pieces of one client's batch: more than one in `pipelined` only."""
        if self.schedule != "pipelined":
            return 1
        return self.micro_batches or min(2, self.per_client_batch_size)

    @property
    def cohort_size(self) -> int:
        """Clients of one round."""
        return self.clients_per_round or self.clients

    @property
    def hands_over(self) -> bool:
        """Whether client parts travel from client to client."""
        return self.resolved_aggregation == "handover" and self.clients > 1

    @property
    def averages(self) -> bool:
        """Whether parameters are averaged every `sync_every` steps: client parts, the trunk's replicas, or both."""
        return self.resolved_aggregation == "fedavg" or self.schedule == "replica"

    @property
    def shares_state(self) -> bool:
        """Whether all clients' parts are alike after each round, so that one can give them to another."""
        return self.resolved_aggregation in ("gradient", "fedavg") and self.schedule != "centralised"

    @property
    def reads_ahead(self) -> bool:
        """Whether the trunk reads its links while it does something else: to take what comes first, not to wait for one
        client while others fall silent, or because clients that are not in a step may send what the next one needs.
        """
        runs_ahead = self.resolved_aggregation == "none" and (self.schedule == "serial" or bool(self.clients_per_round))
        return self.schedule == "pipelined" or self.min_clients > 0 or runs_ahead

    @property
    def clients_meet(self) -> bool:
        """Whether clients need keys for each other."""
        return self.hands_over or self.secure_aggregation
