"""The uncut model trained beside a split run, step by step in turn, so that both meet the same machine.

A machine's speed drifts by 10% within minutes: a ratio of two runs one after the other would measure the drift.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from hpc.centralised import Centralised
from hpc.config import Config
from hpc.data.dataset import load_client_data
from hpc.link.broken import lost_if_broken
from hpc.model.build import ModelBuilder, count_parameters
from hpc.model.source import load_tokenizer
from hpc.rendezvous import Rendezvous
from hpc.report.events import Ended, EventLog, Started, role_path
from hpc.report.provenance import peak_rss_mib
from hpc.schedule import TrainStep, instructions

LONGEST_RUN = timedelta(days=30)
GO, DONE = "baseline/go/{}", "baseline/done/{}"


class BaselineTurns:
    """Trunk rank 0's side: after a step of the run, one step of the baseline, for the first so many steps."""

    def __init__(self, meeting: Rendezvous, config: Config) -> None:
        self._store, self._steps = meeting.store, config.run.baseline_steps
        self._timeout = timedelta(seconds=config.link.timeout_s)

    def take(self, step: int) -> None:
        """Let the baseline take its turn and wait until it has."""
        if step < self._steps:
            self._store.set(GO.format(step), "1")
            with lost_if_broken("the baseline is gone or silent"):
                self._store.wait([DONE.format(step)], self._timeout)


def await_baseline(meeting: Rendezvous, config: Config) -> Callable[[int], None]:
    """A client's side: begin no step while the baseline takes its turn, or they would share the cores."""
    timeout = timedelta(seconds=config.link.timeout_s)

    def before_step(step: int) -> None:
        if 0 < step <= config.run.baseline_steps:
            with lost_if_broken("the baseline is gone or silent"):
                meeting.store.wait([DONE.format(step - 1)], timeout)

    return before_step


def run_baseline(config: Config, meeting: Rendezvous) -> None:
    """The baseline's own process: wait for each turn, take it, say so."""
    with (
        lost_if_broken("trunk rank 0 is gone or silent"),
        EventLog(role_path(Path(meeting.output_folder()), "baseline")) as events,
    ):
        model, builder = build_centralised(config, events)
        steps = [each for each in instructions(config.train, evaluate=False) if isinstance(each, TrainStep)]
        for order in steps[: config.run.baseline_steps]:
            step = order.step
            # An evaluation may come first and take long; the launcher ends this process if the run ends.
            meeting.store.wait([GO.format(step)], LONGEST_RUN)
            if step == 0:
                events.write(Started())
            model.train_step(order)
            meeting.store.set(DONE.format(step), "1")
        parameters = {"model": count_parameters(model.model)}
        events.write(Ended(peak_rss_mib=peak_rss_mib(), parameters=parameters, keys_read=len(builder.source.keys_read)))


def build_centralised(config: Config, events: EventLog) -> tuple[Centralised, ModelBuilder]:
    """The uncut model with every client's data."""
    import torch

    builder = ModelBuilder.of(config)
    tokenizer = load_tokenizer(builder.resolver)
    data = [load_client_data(config, client_id, tokenizer) for client_id in range(config.train.clients)]
    wanted = config.run.device
    device = torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")
    model = Centralised(
        config=config, cut=builder.cut, model=builder.part("whole"), data=data, log=events, device=device
    )
    return model, builder
