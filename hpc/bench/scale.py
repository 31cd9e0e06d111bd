"""Suite `scale`: one trunk rank and more and more clients, all on this machine.

Each number of clients is a run of its own, one after the other: a role is a process, and their memory adds up.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from hpc.bench.load import Monitor
from hpc.bench.markdown import footer, shown, span
from hpc.bench.markdown import table as markdown_table
from hpc.bench.ring import Member, run_ring
from hpc.bench.scale_figures import figures, sizes
from hpc.bench.scale_plot import draw
from hpc.bench.suite import Measured, Options, Raw, Suite
from hpc.bench.turn_figures import WARM_UP_TURNS, member_measured

FLAGS = (
    *("--train.schedule", "client_batch", "--train.sync_every", "1", "--train.aggregation", "auto"),
    *("--train.clients_per_round", "0", "--trunk.ranks", "1"),
)


def measure(options: Options) -> Measured:
    """A turn is a step. `--clients` is the largest number."""
    config = options.config
    setting = {
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "cut": [config.model.head_blocks, config.model.tail_blocks],
        "encryption": config.link.encryption,
        "per_client_batch_size": config.train.per_client_batch_size,
        "turns": options.turns,
        "warm_up_turns": WARM_UP_TURNS,
    }
    return {"setting": setting, "runs": [_run(clients, options) for clients in sizes(config.train.clients)]}


def _run(clients: int, options: Options) -> Measured:
    import torch.distributed  # noqa: F401  # what this process imports is no part of the start-up

    print(f"scale: {clients} clients", file=sys.stderr, flush=True)
    name, turns = f"clients-{clients}", options.turns + WARM_UP_TURNS
    member = Member(name=name, flags=(*FLAGS, "--train.clients", str(clients)))
    began = time.time()
    with Monitor() as monitor:
        roles = run_ring([member], options, turns=turns)[name]
    up = next(event["time"] for event in roles["trunk-0"] if event["event"] == "started")
    return {
        "clients": clients,
        "start_up_seconds": up - began,
        "member": member_measured(roles, steps_per_turn=1, turns=turns, share=monitor.share),
    }


def table(raw: Raw) -> str:
    own, found = raw["measured"]["setting"], figures(raw["measured"])
    head, tail = own["cut"]
    columns = ("clients", "step", "range", "a client", "trunk idle", "trunk, peak", "client, peak", "start-up")
    parts = [
        "# Scale: clients on one trunk rank",
        f"{own['model']} ({own['dtype']}, cut {head} / trunk / {tail}), client_batch, "
        f"{own['per_client_batch_size']} examples a client and step, Gloo, {own['encryption']}; every role is a "
        f"process on this machine. {own['turns']} steps of each run count, after {own['warm_up_turns']} to warm up.",
        markdown_table(columns, [_cells(row) for row in found["rows"]], words=0),
        "Peak: the largest resident set of one process (of the largest client), with the pages that forked roles "
        "share. Start-up: from the command until all roles are up, making their identities included.",
        _lines(found["lines"]),
        _goal(found["goal"]),
        f"Other processes had at most {max(row['others_share'] for row in found['rows']):.1%} of the cores in any "
        "run's steps that count.",
        *footer(raw),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["clients"]),
        shown(row["step_seconds"]["median"], ".3f", " s"),
        span(row["step_seconds"], ".3f"),
        shown(1000 * row["seconds_per_client"]["median"], ".1f", " ms"),
        f"{row['trunk_idle_share']:.0%}",
        shown(row["trunk_peak_rss_mib"], ",.0f", " MiB"),
        shown(row["client_peak_rss_mib"], ",.0f", " MiB"),
        shown(row["start_up_seconds"], ".1f", " s"),
    )


def _lines(lines: dict[str, dict[str, float] | None]) -> str:
    step, trunk, start = (lines[name] for name in ("step_seconds", "trunk_peak_rss_mib", "start_up_seconds"))
    if step is None or trunk is None or start is None:
        return ""
    return (
        f"Least squares, with one client more: a step takes {1000 * step['per_client']:.1f} ms more (from "
        f"{1000 * step['intercept']:.1f} ms), the trunk {trunk['per_client']:.1f} MiB (from "
        f"{trunk['intercept']:,.0f} MiB), start-up {start['per_client']:.2f} s (from {start['intercept']:.1f} s)."
    )


def _goal(goal: dict[str, Any] | None) -> str:
    if goal is None:
        return ""
    return (
        f"Goal, growth at most linear: with {goal['largest_clients']} clients a step takes "
        f"{1000 * goal['found_seconds_per_client']:.1f} ms a client; with {goal['reference_clients']} the slowest "
        f"step took {1000 * goal['limit_seconds_per_client']:.1f} ms a client: {'met' if goal['met'] else 'not met'}."
    )


SUITE = Suite(title="Clients on one trunk rank", measure=measure, figures=figures, table=table, draw=draw)
