"""The uncut model trained beside a split run, step by step in turn (`hpc.turns`), to compare loss and time."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from hpc.centralised import Centralised
from hpc.config import Config
from hpc.data.dataset import load_client_data
from hpc.link.broken import lost_if_broken
from hpc.logs import begin_file
from hpc.model.build import ModelBuilder, count_parameters
from hpc.model.pretrained import load_tokenizer
from hpc.rendezvous import Rendezvous
from hpc.report.events import Ended, EventLog, Started, role_path
from hpc.report.provenance import peak_rss_mib
from hpc.schedule import TrainStep, instructions
from hpc.turns import TURNS, Ring, Turns

# The run's turn may hold an evaluation and take long; the launcher ends this process if the run ends.
LONGEST_RUN = timedelta(days=30)


def run_baseline(config: Config, meeting: Rendezvous) -> str:
    """The baseline's own process: wait for each turn and take one step. Returns how it ended."""
    ring = Ring.from_json(os.environ[TURNS])
    turns = Turns(meeting.store, ring, timeout=LONGEST_RUN)
    with lost_if_broken("trunk rank 0 is gone or silent"):
        folder = Path(meeting.output_folder())
    with EventLog(role_path(folder, "baseline")) as events:
        model, builder = build_centralised(config, events)
        steps = [each for each in instructions(config.train, evaluate=False) if isinstance(each, TrainStep)]
        for turn, order in enumerate(steps[: ring.turns]):
            turns.begin(turn)
            if turn == 0:
                begin_file(folder)
                events.write(Started())
            model.train_step(order)
            if turn == ring.turns - 1:  # before the run goes on, so that its report finds it
                events.write(_ended(model, builder))
            turns.end(turn)
    return f"finished after {ring.turns} steps beside the run"


def _ended(model: Centralised, builder: ModelBuilder) -> Ended:
    parameters = {"model": count_parameters(model.model)}
    return Ended(peak_rss_mib=peak_rss_mib(), parameters=parameters, keys_read=len(builder.source.keys_read))


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
