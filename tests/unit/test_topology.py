"""Launchers' variables → roles; worlds that do not fit are refused with the numbers and the flags."""

from __future__ import annotations

import pytest

from hpc.config import Config, TrainConfig, TrunkConfig
from hpc.errors import TopologyError
from hpc.topology import check_world, clients_of_trunk_rank, place, port_of_job, read_world

TWO_AND_THREE = Config(train=TrainConfig(clients=3), trunk=TrunkConfig(ranks=2))


def env(rank: int, size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "h", "MASTER_PORT": "5", "LOCAL_RANK": "1"}


SRUN = {
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "rack[1-2]n[4-6]",
    "SLURM_JOB_ID": "12",
}


def test_tasks_of_srun_meet_at_its_first_host() -> None:
    world = read_world(SRUN)
    assert (world.master_addr, world.master_port) == ("rack1n4", port_of_job(12))
    assert port_of_job(12) != port_of_job(13)


def test_trunk_ranks_come_first() -> None:
    names = [place(read_world(env(rank, 5)), TWO_AND_THREE).name for rank in range(5)]
    assert names == ["trunk-0", "trunk-1", "client-0", "client-1", "client-2"]


@pytest.mark.parametrize("size", [1, 2, 4, 6, 100])
def test_a_world_that_does_not_fit_is_refused(size: int) -> None:
    with pytest.raises(TopologyError) as refused:
        check_world(size, TWO_AND_THREE)
    for word in (f"{size} processes", "--trunk.ranks 2", "--train.clients 3", "need 5"):
        assert word in str(refused.value)


def test_centralised_runs_alone() -> None:
    config = Config(train=TrainConfig(schedule="centralised"))
    assert place(read_world({}), config).name == "centralised"
    with pytest.raises(TopologyError, match="1 process"):
        check_world(3, config)


@pytest.mark.parametrize(
    ("environ", "launcher", "rank", "size"),
    [
        (env(2, 5), "env", 2, 5),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "SLURM_PROCID": "0"}, "mpi", 1, 4),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, "mpi", 3, 4),
        (SRUN, "slurm", 2, 3),
        ({**SRUN, "SLURM_NTASKS": "9"}, "slurm", 2, 3),
        ({**SRUN, "PMIX_RANK": "2"}, "slurm", 2, 3),
        ({**SRUN, "PMI_RANK": "2", "PMI_SIZE": "3"}, "slurm", 2, 3),
        ({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0"}, "mpi", 0, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_JOB_ID": "7", "ENVIRONMENT": "BATCH"}, "none", 0, 1),
        ({}, "none", 0, 1),
    ],
)
def test_each_launcher_is_recognised(environ: dict[str, str], launcher: str, rank: int, size: int) -> None:
    world = read_world(environ)
    assert (world.launcher, world.global_rank, world.world_size) == (launcher, rank, size)


def test_a_variable_that_is_no_number_is_named() -> None:
    with pytest.raises(TopologyError, match="RANK is 'x'"):
        read_world({"RANK": "x", "WORLD_SIZE": "2"})


def test_every_client_has_one_trunk_rank() -> None:
    config = Config(train=TrainConfig(clients=7), trunk=TrunkConfig(ranks=3))
    assert sorted(c for r in range(3) for c in clients_of_trunk_rank(r, config)) == list(range(7))
    assert clients_of_trunk_rank(1, config) == [1, 4]
