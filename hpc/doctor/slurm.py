"""Slurm: its commands, its controller, its partitions, and PMIx."""

from __future__ import annotations

import os
import shutil

from hpc.doctor.finding import Asked, Finding, fail, first_words, ok, output_of, warn

PATIENCE_S = 6.0


def slurm(asked: Asked) -> Finding:
    """A fault only where the environment says that a cluster is meant; without its commands, this is no cluster."""
    missing = [name for name in ("sinfo", "sbatch", "srun") if shutil.which(name) is None]
    meant = any(name in os.environ for name in ("SLURM_CONF", "SLURM_JOB_ID"))
    broken = fail if meant else warn
    if len(missing) == 3:
        cure = "load its module, or mend PATH"
        return (
            fail("its commands are not found", cure) if meant else ok("not found; only sbatch slurm/train.sh needs it")
        )
    if missing:
        return broken(f"{', '.join(missing)} not found", "install the rest of Slurm's client commands")
    code, out, err = output_of(["sinfo", "--noheader", "--format", "%P %a %D %T"], timeout_s=PATIENCE_S)
    if code:
        err = err.strip() or f"exit code {code}"
        conf = os.environ.get("SLURM_CONF", "its default place")
        cure = f"is slurmctld up, and is slurm.conf ({conf}) the cluster's? Not needed for launch/local.py"
        return broken(f"the controller does not answer: {first_words(err.strip().splitlines()[-1])}", cure)
    usable = partitions(out)
    if not usable:
        return broken("no partition has a node that is up", "see sinfo -R for the reasons")
    told = output_of(["srun", "--mpi=list"], timeout_s=PATIENCE_S)
    pmix = [name for name in (told[1] + told[2]).split() if name.startswith("pmix")]
    mpi = f"PMIx ({', '.join(pmix)})" if pmix else "no PMIx"
    version = output_of(["sinfo", "--version"], timeout_s=PATIENCE_S)[1].strip()
    return ok(f"{version}: {', '.join(usable)}; {mpi}")


def partitions(told: str) -> list[str]:
    """`name (nodes)` of the partitions that are up, from lines of `sinfo --format "%P %a %D %T"`."""
    nodes: dict[str, int] = {}
    for line in told.splitlines():
        name, available, count, state = (line.split() + [""] * 4)[:4]
        if available == "up" and not state.startswith(("down", "drain", "fail", "unknown")) and not state.endswith("*"):
            nodes[name.rstrip("*")] = nodes.get(name.rstrip("*"), 0) + int(count)
    return [f"{name} ({count} nodes)" for name, count in nodes.items()]
