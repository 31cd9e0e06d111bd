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
    same_function: bool = False
    """Whether it computes what its reference does, so that nothing may differ."""


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
    same_function=True,
)
FEDBERT = Method(
    name="fedbert",
    title="FedBERT's cut, serial",
    flags={"train.schedule": "serial", "model.head_blocks": 0, "model.tail_blocks": 0},
    reference="centralised",
    same_function=True,
)
CLIENT_BATCH = Method(
    name="client_batch",
    title="FL-GLM, client-batch",
    flags={"train.schedule": "client_batch"},
    by_client=False,
    reference="centralised_union",
    same_function=True,
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
