"""Where roles run: trunk ranks on GPUs first, one task each; a world that does not fit is refused with the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc.config import Config, RunConfig, TrainConfig, TrunkConfig
from hpc.errors import TopologyError
from hpc.placement import Host, Seat, as_table, place_roles, seats_in_order


def host(name: str, tasks: int = 1, gpus: int = 0, cpus: int = 4) -> Host:
    return Host(name=name, address=name, tasks=tasks, cpus=cpus, gpus=gpus)


def config(ranks: int, clients: int, **run: object) -> Config:
    settings = RunConfig(**run)  # type: ignore[arg-type]
    return Config(trunk=TrunkConfig(ranks=ranks), train=TrainConfig(clients=clients), run=settings)


def told(seats: list[Seat]) -> list[tuple[str, str, str]]:
    return [(seat.role, seat.host.name, seat.device) for seat in seats]


def test_trunk_ranks_go_where_the_gpus_are() -> None:
    seats = place_roles([host("a"), host("g", tasks=2, gpus=2), host("b")], config(2, 2))
    assert told(seats) == [
        ("trunk-0", "g", "cuda:0"),
        ("trunk-1", "g", "cuda:1"),
        ("client-0", "a", "cpu"),
        ("client-1", "b", "cpu"),
    ]


def test_without_gpus_hosts_fill_in_their_order() -> None:
    seats = place_roles([host("a", tasks=2), host("b")], config(1, 2))
    assert told(seats) == [("trunk-0", "a", "cpu"), ("client-0", "a", "cpu"), ("client-1", "b", "cpu")]


def test_trunk_ranks_beyond_the_gpus_still_have_a_task() -> None:
    seats = place_roles([host("g", tasks=1, gpus=4), host("a", tasks=3)], config(2, 2))
    assert told(seats)[:2] == [("trunk-0", "g", "cuda:0"), ("trunk-1", "a", "cpu")]


def test_a_client_gets_a_gpu_that_no_trunk_rank_needs() -> None:
    seats = place_roles([host("g", tasks=3, gpus=2)], config(1, 2))
    assert [device for _, _, device in told(seats)] == ["cuda:0", "cuda:1", "cpu"]


def test_run_device_cpu_leaves_the_gpus_alone() -> None:
    seats = place_roles([host("a"), host("g", tasks=2, gpus=2)], config(1, 2, device="cpu"))
    assert told(seats)[0] == ("trunk-0", "a", "cpu")


def test_threads_are_the_tasks_share_of_the_host() -> None:
    seats = place_roles([host("a", tasks=1, cpus=8), host("b", tasks=2, cpus=5)], config(1, 2))
    assert [seat.threads for seat in seats] == [8, 2, 2]
    assert {seat.threads for seat in place_roles([host("a", tasks=3)], config(1, 2, threads=7))} == {7}


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=5), st.data())
def test_every_role_has_a_task_of_its_own(shapes: list[tuple[int, int]], data: st.DataObject) -> None:
    hosts = [host(f"h{n}", tasks=tasks, gpus=gpus) for n, (tasks, gpus) in enumerate(shapes)]
    total = sum(each.tasks for each in hosts)
    if total < 2:
        return
    ranks = data.draw(st.integers(1, total // 2))
    seats = place_roles(hosts, config(ranks, total - ranks))
    assert [seat.rank for seat in seats] == list(range(total))
    assert len({(seat.host.name, seat.local_rank) for seat in seats}) == total
    assert all(0 <= seat.local_rank < seat.host.tasks for seat in seats)
    taken = [(seat.host.name, seat.gpu) for seat in seats if seat.gpu is not None]
    assert len(set(taken)) == len(taken)
    assert all(seat.gpu < seat.host.gpus for seat in seats if seat.gpu is not None)
    on_gpu = sum(seat.gpu is not None for seat in seats[:ranks])
    assert on_gpu == min(ranks, sum(min(each.gpus, each.tasks) for each in hosts))


@pytest.mark.parametrize("tasks", [1, 2, 4, 9])
def test_a_job_of_another_size_is_refused(tasks: int) -> None:
    with pytest.raises(TopologyError) as refused:
        place_roles([host("a", tasks=tasks)], config(1, 2))
    for words in (f"{tasks} tasks", "--trunk.ranks 1", "--train.clients 2", "3 roles", "sbatch --ntasks=3"):
        assert words in str(refused.value)


def test_centralised_is_one_task() -> None:
    alone = Config(train=TrainConfig(schedule="centralised"))
    assert told(place_roles([host("g", gpus=1)], alone)) == [("centralised", "g", "cuda:0")]
    with pytest.raises(TopologyError, match="sbatch --ntasks=1"):
        place_roles([host("a", tasks=3)], alone)


def test_ranks_of_a_launcher_stay_where_it_put_them() -> None:
    seats = seats_in_order([host("a", tasks=2, gpus=1), host("g", tasks=1, gpus=4)], config(1, 2))
    assert told(seats) == [("trunk-0", "a", "cuda:0"), ("client-0", "a", "cuda:0"), ("client-1", "g", "cuda:0")]


def test_the_table_has_a_row_for_each_role() -> None:
    table = as_table(place_roles([host("long-name", tasks=3)], config(1, 2)), {"trunk": 2**20, "client": 3 * 2**19})
    assert [line.split() for line in table.splitlines()] == [
        ["rank", "host", "role", "device", "threads", "memory", "MiB"],
        ["0", "long-name", "trunk-0", "cpu", "1", "1.0"],
        ["1", "long-name", "client-0", "cpu", "1", "1.5"],
        ["2", "long-name", "client-1", "cpu", "1", "1.5"],
    ]
