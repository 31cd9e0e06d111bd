"""The trunk's replicas: many clients' small batches in one pass, against one pass for each client."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hpc.config import Config

CLIENTS, ROWS, TOKENS = 8, 1, 40
REPETITIONS, WARM_UP = 9, 2


def measure_passes(config: Config) -> dict[str, Any]:
    """Seconds of each repetition, forward and backward through the trunk: together and one by one, in turn."""
    import torch

    from hpc.model.build import ModelBuilder
    from hpc.replica_trunk import ReplicaTrunk

    torch.set_num_threads(config.run.threads or torch.get_num_threads())
    builder = ModelBuilder.of(config)
    trunk = ReplicaTrunk(builder.part("trunk"), config, clients=range(CLIENTS), device=torch.device("cpu"))
    torch.manual_seed(0)
    smashed_BTD, grad_BTD = torch.randn(2, CLIENTS * ROWS, TOKENS, builder.hidden_size, dtype=builder.dtype)

    def together() -> None:
        trunk.forward(smashed_BTD, [(client, ROWS) for client in range(CLIENTS)], input_learns=True)
        trunk.backward(grad_BTD)

    def one_by_one() -> None:
        for client in range(CLIENTS):
            own = slice(client * ROWS, (client + 1) * ROWS)
            trunk.forward(smashed_BTD[own], [(client, ROWS)], input_learns=True)
            trunk.backward(grad_BTD[own])

    seconds = alternate({"together": together, "one_by_one": one_by_one}, REPETITIONS + WARM_UP)
    return {"clients": CLIENTS, "rows": ROWS, "tokens": TOKENS, "warm_up": WARM_UP, "seconds": seconds}


def alternate(works: dict[str, Callable[[], None]], times: int) -> dict[str, list[float]]:
    """Wall seconds of each call; A B A B, so that all meet the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(times):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds
