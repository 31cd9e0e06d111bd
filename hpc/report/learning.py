"""The closing table of what was learnt: held-out accuracy and loss by client and over all, and the training loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from hpc.report.cells import MANY_CLIENTS, count, figure, percent, table_of

Figures = Mapping[str, Any]


def learning(summary: Mapping[str, Any]) -> Table:
    evaluation = summary["eval"]
    title = "What was learnt (on held-out examples; loss in nats per label token)"
    columns = ("accuracy\nfirst", "\nlast", "\npoints", "loss\nfirst", "\nlast", "\nchange")
    table = table_of(title, "", *columns)
    for name, found in _rows(evaluation["per_client"]):
        table.add_row(name, *_cells(found))
    if len(evaluation["per_client"]) > 1:
        mean = {key.removeprefix("mean_client_"): evaluation[key] for key in evaluation if key.startswith("mean_")}
        table.add_row("mean client", *_cells(mean))
    examples = f" ({count(evaluation['examples'], 'example')})" if evaluation["examples"] else ""
    table.add_row(f"all{examples}", *_cells(evaluation), style="bold")
    training = {"loss_before": summary["loss_first"], "loss": summary["loss_last"]}
    table.add_row("training loss", "", "", "", *_loss_cells(training), style="bold")
    return table


def _rows(per_client: Mapping[str, Figures]) -> list[tuple[str, Figures]]:
    """Every client, or of many the best, the median and the worst by last accuracy and then by loss."""
    if len(per_client) <= MANY_CLIENTS:
        return list(per_client.items())
    ranked = sorted(((name, found) for name, found in per_client.items() if found["accuracy"] is not None), key=_rank)
    places = {"best": 0, "median": (len(ranked) - 1) // 2, "worst": len(ranked) - 1} if ranked else {}
    return [(f"{title}: {ranked[place][0]}", ranked[place][1]) for title, place in places.items()]


def _rank(row: tuple[str, Figures]) -> tuple[float, float]:
    loss = row[1]["loss"]
    return -row[1]["accuracy"], 0.0 if loss is None else loss


def _cells(found: Figures) -> tuple[str, ...]:
    before, after = found["accuracy_before"], found["accuracy"]
    change = (after - before) * 100 if before is not None and after is not None else None
    return percent(before), percent(after), figure(change, "+.1f"), *_loss_cells(found)


def _loss_cells(found: Figures) -> tuple[str, str, str]:
    before, after = found["loss_before"], found["loss"]
    change = after - before if before is not None and after is not None else None
    return figure(before, ".4f"), figure(after, ".4f"), figure(change, "+.4f")
