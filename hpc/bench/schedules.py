"""Suite `schedules`: the schedules side by side, on the same tokens, against the uncut model."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hpc.bench.load import Monitor
from hpc.bench.replica_pass import measure_passes
from hpc.bench.ring import Member, run_ring
from hpc.bench.schedule_figures import figures
from hpc.bench.schedule_plot import draw
from hpc.bench.schedule_table import table
from hpc.bench.suite import Measured, Options, Suite
from hpc.bench.turn_figures import WARM_UP_TURNS, member_measured

SYNC_EVERY = 5
MEMORY_STEPS = 3
MEMORY_RUNS = {"8 clients x 4 rows": (8, 4), "1 client x 32 rows": (1, 32)}


def members(clients: int) -> list[Member]:
    """A turn of each is one batch of every client. `serial` takes a step for each of them."""
    every = ("--train.sync_every", "1", "--train.aggregation", "auto", "--train.clients_per_round", "0")

    def member(name: str, *flags: str, schedule: str = "", steps: int = 1) -> Member:
        return Member(name=name, flags=("--train.schedule", schedule or name, *every, *flags), steps_per_turn=steps)

    # On a CPU, pieces smaller than a client's batch cost more than their overlap gains.
    pieces = ("--train.micro_batches", "1")
    return [
        member("centralised", "--train.order", "union"),
        member("centralised_sequential", "--train.order", "sequential", schedule="centralised", steps=clients),
        member("serial", steps=clients),
        member("pipelined", *pieces),
        # Each trunk rank has its share of the cores; two clients' rows are computed at a time.
        member("pipelined_2_ranks", *pieces, "--trunk.ranks", "2", schedule="pipelined"),
        # In two rings, these two stay together: one has a goal in terms of the other.
        member("client_batch"),
        member("replica", "--train.sync_every", str(SYNC_EVERY), "--train.aggregation", "fedavg"),
    ]


def measure(options: Options) -> Measured:
    """Rings first, while the machine's memory is free for them; the small measurements after."""
    train, turns = options.config.train, options.turns + WARM_UP_TURNS
    rings = [_ring(group, options, turns) for group in dealt(members(train.clients), options.rings)]
    _say("peak memory of the trunk")
    memory = {name: _trunk_peak_mib(clients, rows, options) for name, (clients, rows) in MEMORY_RUNS.items()}
    _say("passes of the trunk")
    with Monitor() as monitor:
        passes = measure_passes(options.config)
    return {
        "setting": _setting(options),
        "rings": rings,
        "replica_memory": {"steps": MEMORY_STEPS, "trunk_peak_rss_mib": memory},
        "replica_pass": {**passes, "shares": monitor.share()},
    }


def dealt(everybody: Sequence[Member], rings: int) -> list[list[Member]]:
    """The members of each ring. The uncut model is in all of them, as the others are compared with it."""
    reference, *others = everybody
    size = -(-len(others) // rings)
    return [[reference, *others[first : first + size]] for first in range(0, len(others), size)]


def _ring(group: Sequence[Member], options: Options, turns: int) -> Measured:
    _say("turns of " + ", ".join(member.name for member in group))
    with Monitor() as monitor:
        events = run_ring(group, options, turns=turns)
    measured = {
        member.name: member_measured(
            events[member.name], steps_per_turn=member.steps_per_turn, turns=turns, share=monitor.share
        )
        for member in group
    }
    return {"members": measured}


def _trunk_peak_mib(clients: int, rows: int, options: Options) -> float:
    sizes = ("--train.clients", str(clients), "--train.per_client_batch_size", str(rows))
    flags = ("--train.schedule", "replica", "--train.sync_every", str(SYNC_EVERY), *sizes)
    name = f"memory-{clients}x{rows}"
    events = run_ring([Member(name=name, flags=flags)], options, turns=MEMORY_STEPS)[name]["trunk-0"]
    peak: float = events[-1]["peak_rss_mib"]
    return peak


def _setting(options: Options) -> Measured:
    config = options.config
    return {
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "cut": [config.model.head_blocks, config.model.tail_blocks],
        "adapter": f"{config.adapter.method}, r {config.adapter.lora_r}",
        "task": config.data.task,
        "clients": config.train.clients,
        "per_client_batch_size": config.train.per_client_batch_size,
        "sync_every": SYNC_EVERY,
        "turns": options.turns,
        "warm_up_turns": WARM_UP_TURNS,
    }


def _say(what: str) -> None:
    print(f"schedules: {what}", file=sys.stderr, flush=True)


SUITE = Suite(title="Schedules side by side", measure=measure, figures=figures, table=table, draw=draw)
