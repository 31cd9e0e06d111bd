"""What is asked of srun, what Slurm's answers mean, and when a job takes up its run. The real thing: tests/slurm."""

from __future__ import annotations

import pytest

from hpc.config import Config, RunConfig
from hpc.errors import TopologyError
from hpc.placement import Host, Seat
from hpc.slurm_hosts import gpus_of_job, hosts_of_job, meeting_host, require_job
from hpc.slurm_job import how
from hpc.slurm_steps import resume_flags, run_name, step_command, step_environment

JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "2,1",
    "SLURM_JOB_CPUS_PER_NODE": "8,4",
}
ANSWERS = {
    ("show", "job", "--details", "--oneliner", "7"): "JobId=7 JOB_GRES=gpu:2   Nodes=n1 CPU_IDs=0-7 Mem=0 "
    "GRES=gpu:a100:2(IDX:0-1)   Nodes=n2 CPU_IDs=0-3 Mem=0 GRES= MinCPUsNode=1",
    ("show", "hostnames", "n[1-2]"): "n1\nn2\n",
    ("show", "node", "--oneliner", "n[1-2]"): "NodeName=n1 Arch=x NodeAddr=127.0.0.5 Port=1\n"
    "NodeName=n2 Arch=x NodeAddr=127.0.0.6 Port=2\n",
    ("show", "node", "--oneliner", "n.invalid"): "NodeName=n.invalid Arch=x NodeAddr=127.0.0.7 Port=2\n",
}


def ask(*arguments: str) -> str:
    try:
        return ANSWERS[arguments]
    except KeyError:
        raise TopologyError("Slurm is away") from None


def seat(gpu: int | None = None, group: int | None = None) -> Seat:
    host = Host(name="n1", address="127.0.0.5", tasks=2, cpus=8, gpus=2, het_group=group)
    return Seat(rank=1, role="client-0", host=host, local_rank=1, gpu=gpu, threads=4)


def test_the_hosts_of_a_job() -> None:
    found = [(host.name, host.tasks, host.cpus, host.gpus) for host in hosts_of_job(JOB, ask)]
    assert found == [("n1", 2, 8, 2), ("n2", 1, 4, 0)]


def test_the_hosts_of_a_heterogeneous_job_come_component_by_component() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_HET_SIZE": "1"}
    job |= {f"{name}_HET_GROUP_0": value for name, value in JOB.items()}
    assert [host.het_group for host in hosts_of_job(job, ask)] == [0, 0]


@pytest.mark.parametrize(
    ("gres", "count"),
    [("gpu:2", 2), ("gpu:a100:4(IDX:0-3)", 4), ("gpu:a100:1(IDX:0),gpu:v100:2(IDX:1-2)", 3), ("craynetwork:1", 0)],
)
def test_gpus_are_those_that_the_job_was_granted(gres: str, count: int) -> None:
    assert gpus_of_job(f"JobId=1 Nodes=n[1-2] CPU_IDs=0 Mem=0 GRES={gres} x") == {"n1": count, "n2": count}


def test_ranks_meet_at_an_address_where_the_name_means_nothing() -> None:
    assert meeting_host("localhost", {}, ask) == "localhost"
    assert meeting_host("n.invalid", {}, ask) == "127.0.0.7"
    assert meeting_host("m.invalid", {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.8"}, ask) == "127.0.0.8"


@pytest.mark.parametrize("name", JOB)
def test_outside_of_a_job_one_line_says_so(name: str) -> None:
    require_job(JOB)
    with pytest.raises(TopologyError, match=f"{name} is not set.*sbatch slurm/train.sh.*launch/local.py"):
        require_job({key: value for key, value in JOB.items() if key != name})


def test_a_step_has_its_host_and_its_share() -> None:
    command = step_command(seat(), job_has_gpus=False)
    assert command[0] == "srun"
    for option in ("--nodelist=n1", "--ntasks=1", "--nodes=1", "--cpus-per-task=4", "--kill-on-bad-exit=0", "--exact"):
        assert option in command
    assert not [option for option in command if option.startswith(("--gres", "--het-group"))]


def test_a_step_asks_for_a_gpu_only_if_it_has_one() -> None:
    assert "--gres=gpu:1" in step_command(seat(gpu=1), job_has_gpus=True)
    assert "--gres=none" in step_command(seat(), job_has_gpus=True)
    assert "--het-group=1" in step_command(seat(group=1), job_has_gpus=False)


def test_a_role_learns_its_rank_and_nothing_that_was_meant_for_the_job() -> None:
    given = {"HOME": "/h", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_MEM_PER_NODE": "5", "SLURM_GPUS": "2"}
    environ = step_environment(given, seat(), roles=3, address="h", port=5)
    assert environ == {
        "HOME": "/h",
        "SLURM_JOB_ID": "7",
        "RANK": "1",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "5",
    }
    assert step_environment({}, seat(gpu=1), roles=3, address="h", port=5)["LOCAL_RANK"] == "0"


def test_a_run_without_a_name_is_named_after_its_job() -> None:
    assert run_name(Config(), "12") == ["--run.name", "slurm-12"]
    assert run_name(Config(run=RunConfig(name="mine")), "12") == []
    assert run_name(Config(run=RunConfig(output_dir="there")), "12") == []


@pytest.mark.parametrize(
    ("named_after_job", "restarts", "committed", "resumes"),
    [
        (True, 0, [3], True),
        (True, 1, [3], True),
        (False, 1, [3], True),
        (False, 0, [3], False),
        (True, 1, [], False),
    ],
)
def test_a_job_takes_up_its_own_run(named_after_job: bool, restarts: int, committed: list[int], resumes: bool) -> None:
    flags = resume_flags(Config(), named_after_job=named_after_job, restarts=restarts, committed=committed)
    assert flags == (["--run.resume_from_checkpoint", "latest"] if resumes else [])


def test_a_user_who_said_where_to_begin_is_obeyed() -> None:
    config = Config(run=RunConfig(name="mine", resume_from_checkpoint="checkpoint-3"))
    assert resume_flags(config, named_after_job=False, restarts=1, committed=[3, 6]) == []


def test_exit_codes_in_words() -> None:
    assert how(137) == how(-9) == "was killed by SIGKILL"
    assert how(1) == "ended with exit code 1"
