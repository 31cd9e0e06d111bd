"""Suite `efficiency`: the paper's table of time. What a training sample costs by how the work is divided.

A turn is the same few samples for every federation, one sample a client and step; all of a ring take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from hpc.bench.efficiency_figures import REFERENCE, figures
from hpc.bench.efficiency_plot import draw
from hpc.bench.efficiency_table import csv, table
from hpc.bench.fixed_rows import lengths, write_rows
from hpc.bench.load import Monitor
from hpc.bench.namespaces import Hosts, two_hosts, why_no_slow_cable
from hpc.bench.ring import Member, run_ring
from hpc.bench.stream import measure_cable
from hpc.bench.suite import Measured, Options, Suite
from hpc.bench.turn_figures import WARM_UP_TURNS, member_measured

SAMPLES = 8  # of a turn; every number of clients divides it
CLIENTS = (2, 4, 8)  # the published ones
MOST_CLIENTS = 16  # at the same time, each a process: what 24 GiB have room for with SmolLM2-135M
CABLE_MBIT, CABLE_BURST = 8800, "4mb"  # 1100 MB/s, as in the paper; the burst is 4 ms of it


def members(most: int, hosts: Hosts | None) -> list[Member]:
    """The reference first. `most`: clients of the largest federation; `hosts`: where there can be two."""
    apart = [_member("two_hosts", "serial", 1, hosts)] if hosts is not None else []
    found = [_member(REFERENCE, "centralised", 1), _member("one_host", "serial", 1), *apart]
    sizes = [clients for clients in CLIENTS if clients <= most]
    if sizes:
        found.append(_member("serial_2", "serial", 2))
    for clients in sizes:
        found += [_member(f"{name}_{clients}", name, clients) for name in ("client_batch", "replica")]
    return found


def _member(name: str, schedule: str, clients: int, hosts: Hosts | None = None) -> Member:
    # Hand-overs and averages come once a turn, so that every turn has its share of them.
    each = SAMPLES // clients
    sync_every = 1 if schedule in ("centralised", "client_batch") else each
    flags = (
        *("--train.schedule", schedule, "--train.clients", str(clients), "--train.per_client_batch_size", "1"),
        *("--train.sync_every", str(sync_every), "--train.aggregation", "auto", "--train.order", "union"),
        *("--train.clients_per_round", "0", "--train.micro_batches", "0", "--trunk.ranks", "1"),
    )
    steps = SAMPLES if schedule == "serial" else each
    return Member(name=name, flags=flags, steps_per_turn=steps, hosts=hosts)


def clients_of(member: Member) -> int:
    return int(member.flags[member.flags.index("--train.clients") + 1])


def in_rings(everybody: Sequence[Member], most: int) -> list[list[Member]]:
    """In order, with at most so many clients in a ring, or one federation that has more.

    The reference is in all of them, as the others are compared with it.
    """
    reference, *others = everybody
    rings: list[list[Member]] = []
    for member in others:
        if not rings or sum(clients_of(each) for each in rings[-1][1:]) + clients_of(member) > most:
            rings.append([reference])
        rings[-1].append(member)
    return rings


def measure(options: Options) -> Measured:
    """`--clients`: of the largest federation; `--rings`: so many times fewer clients at the same time."""
    flags = (*options.flags, *write_rows(options.config, SAMPLES, options.folder / "rows.jsonl"))
    setting, options = _setting(options, lengths(flags)), replace(options, flags=flags)
    with _cable() as (hosts, cable):
        rings = in_rings(members(options.config.train.clients, hosts), MOST_CLIENTS // options.rings)
        before = 0 if hosts is None else _carried(hosts)
        found = [_ring(group, number, len(rings), options) for number, group in enumerate(rings, start=1)]
        if hosts is not None:
            cable["carried_bytes"] = _carried(hosts) - before
    return {"setting": setting, "cable": cable, "rings": found}


@contextmanager
def _cable() -> Iterator[tuple[Hosts | None, Measured]]:
    """Two hosts, and what is known of the cable between them; or no hosts, and why there are none."""
    asked: Measured = {"asked_bytes_per_second": CABLE_MBIT * 10**6 / 8}
    if reason := why_no_slow_cable(CABLE_MBIT, CABLE_BURST):
        _say(f"two hosts are left out: {reason}")
        yield None, {**asked, "left_out": reason}
        return
    with two_hosts(lines=True) as hosts:
        hosts.slow_down(CABLE_MBIT, burst=CABLE_BURST)
        found = measure_cable(hosts)
        _say(f"the cable between the two hosts carries {found / 1e6:,.0f} MB/s")
        yield hosts, {**asked, "found_bytes_per_second": found}


def _carried(hosts: Hosts) -> int:
    """Bytes over the cable so far, both ways."""
    return sum(hosts.bytes_sent(host) for host in "ab")


def _ring(group: Sequence[Member], number: int, rings: int, options: Options) -> Measured:
    _say(f"ring {number} of {rings}: {', '.join(member.name for member in group)}")
    turns = options.turns + WARM_UP_TURNS
    at = replace(options, folder=options.folder / f"ring-{number}")
    with Monitor() as monitor:
        events = run_ring(group, at, turns=turns)
    return {
        "members": {
            member.name: {
                "clients": clients_of(member),
                **member_measured(
                    events[member.name], steps_per_turn=member.steps_per_turn, turns=turns, share=monitor.share
                ),
            }
            for member in group
        }
    }


def _setting(options: Options, tokens: list[int]) -> Measured:
    config, adapter = options.config, options.config.adapter
    sizes = {
        "lora": f"LoRA, r {adapter.lora_r}, alpha {adapter.lora_alpha}",
        "p_tuning_v2": f"p-tuning v2, {adapter.num_virtual_tokens} tokens",
        "full": "all weights",
    }
    return {
        "model": config.model.name_or_path,
        "dtype": config.model.dtype,
        "cut": [config.model.head_blocks, config.model.tail_blocks],
        "adapter": sizes[adapter.method],
        "encryption": config.link.encryption,
        "task": config.data.task,
        "tokens": tokens,
        "samples_per_turn": SAMPLES,
        "turns": options.turns,
        "warm_up_turns": WARM_UP_TURNS,
    }


def _say(what: str) -> None:
    print(f"efficiency: {what}", file=sys.stderr, flush=True)


SUITE = Suite(title="Time of a training sample", measure=measure, figures=figures, table=table, draw=draw, csv=csv)
