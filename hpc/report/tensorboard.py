"""A run's events for TensorBoard, under `<run folder>/tb/`. torch's writer is imported only when it is used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc.report.events import Event, current_attempt

Scalar = tuple[str, float, int, float]  # tag, value, step, unix time


def write_tensorboard(
    summary: Mapping[str, Any], events_by_role: Mapping[str, Sequence[Event]], folder: str | Path
) -> Path:
    """Write the whole run anew into `folder`/tb; points of an earlier call go, or every curve would be drawn twice."""
    from torch.utils.tensorboard import SummaryWriter

    target = Path(folder) / "tb"
    for old in target.glob("events.out.tfevents.*"):
        old.unlink()
    with SummaryWriter(str(target)) as writer:
        for tag, value, step, when in scalars(summary, events_by_role):
            writer.add_scalar(tag, value, step, walltime=when)
    return target


def scalars(summary: Mapping[str, Any], events_by_role: Mapping[str, Sequence[Event]]) -> Iterator[Scalar]:
    """What is drawn: the run's losses and accuracy, and each role's own figures under its name."""
    times: dict[int, float] = {}
    for role, found in events_by_role.items():
        for event in current_attempt(found):
            if "step" in event:
                times.setdefault(event["step"], event["time"])
                yield from _of_role(role, event)
    for step, loss in enumerate(summary["losses"], start=summary["first_step"]):
        if loss is not None:
            yield "loss", loss, step, times.get(step, 0.0)
    for step, accuracy in summary["eval"]["history"]:
        yield "accuracy", accuracy, step, times.get(step, 0.0)
    for step, loss in summary["eval"]["loss_history"]:
        yield "held_out_loss", loss, step, times.get(step, 0.0)


def _of_role(role: str, event: Event) -> Iterator[Scalar]:
    step, when = event["step"], event["time"]
    if event["event"] == "eval" and event["total"]:
        client = role if event.get("client_id") is None else f"client-{event['client_id']}"
        if event["correct"] is not None:
            yield f"accuracy/{client}", event["correct"] / event["total"], step, when
        if event.get("label_tokens"):
            yield f"held_out_loss/{client}", event["loss_sum"] / event["label_tokens"], step, when
    if event["event"] != "step":
        return
    for name in ("learning_rate", "grad_norm"):
        if event.get(name) is not None:
            yield f"{name}/{role}", event[name], step, when
    for name, number in event.get("bytes", {}).items():
        yield f"link_{name}_bytes/{role}", number, step, when
    for name, seconds in event["seconds"].items():
        yield f"seconds_{name}/{role}", seconds, step, when
    if event.get("label_tokens"):
        yield f"loss/{role}", event["loss_sum"] / event["label_tokens"], step, when
