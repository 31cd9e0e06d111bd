"""The rows of a table: how a model is trained, and which uncut training computes the same function. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

ZERO_SHOT = "zero_shot"


@dataclass(kw_only=True, frozen=True)
class Method:
    """One row."""

    name: str
    title: str
    flags: Mapping[str, object] = field(default_factory=dict)
    """Of the configuration, over those of model, adapter and task."""
    by_client: bool = True
    """A step is one client's batch; otherwise one batch of every client, and a run has as many times fewer steps."""
    reference: str | None = None
    """The uncut training that the row is compared with."""
    loss_bound: float | None = None
    """How far a step's loss may be from the reference's, in parts of the mean loss, where the row computes the same
    function: 0 where it does so in the same order. None: another algorithm."""

    @property
    def same_function(self) -> bool:
        """Whether it computes what its reference does."""
        return self.loss_bound is not None


CENTRALISED = Method(
    name="centralised",
    title="centralised",
    flags={"train.schedule": "centralised", "train.order": "sequential"},
)
CENTRALISED_UNION = Method(
    name="centralised_union",
    title="centralised, all clients' batches as one",
    flags={"train.schedule": "centralised", "train.order": "union"},
    by_client=False,
)
SERIAL = Method(
    name="serial",
    title="FL-GLM, serial",
    flags={"train.schedule": "serial"},
    reference="centralised",
    loss_bound=0.0,
)
FEDBERT = Method(
    name="fedbert",
    title="FedBERT's cut, serial",
    flags={"train.schedule": "serial", "model.head_blocks": 0, "model.tail_blocks": 0},
    reference="centralised",
    loss_bound=0.0,
)
CLIENT_BATCH = Method(
    name="client_batch",
    title="FL-GLM, client-batch",
    flags={"train.schedule": "client_batch"},
    by_client=False,
    reference="centralised_union",
    loss_bound=1e-3,  # sums over clients are taken in another order, and training makes more of that
)
REPLICA = Method(
    name="replica",
    title="FL-GLM, replica-parallel",
    flags={"train.schedule": "replica"},
    by_client=False,
    reference="centralised_union",
)
METHODS: Mapping[str, Method] = {
    method.name: method for method in (CENTRALISED, SERIAL, FEDBERT, CENTRALISED_UNION, CLIENT_BATCH, REPLICA)
}
TITLES: Mapping[str, str] = {ZERO_SHOT: "zero-shot", **{name: method.title for name, method in METHODS.items()}}
