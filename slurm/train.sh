#!/usr/bin/env bash
#SBATCH --job-name=hpc-train
#SBATCH --ntasks=3
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

# One federated run: a task for each trunk rank and each client.
#
#   sbatch slurm/train.sh                                          the default recipe: one trunk rank, two clients
#   sbatch --ntasks=9 slurm/train.sh --train.clients 8             flags after the script are the run's
#   sbatch --gres=gpu:1 --cpus-per-task=8 --time=12:00:00 slurm/train.sh --config my.yaml
#   sbatch slurm/train.sh --dry_run                                who would run where; starts nothing
#
# HPC_ROOT (the repository), HPC_PYTHON and HPC_SITE (slurm/site.sh) may be set in the environment.
# 120 s before the time limit the trunk is asked for a checkpoint; then the job is requeued and goes on from it.
set -euo pipefail

# sbatch runs a copy of this file: the repository is where it was submitted, above that, or where the original lies.
root=${HPC_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}
while [ ! -e "$root/slurm/common.sh" ] && [ "$root" != / ] && [ "$root" != . ]; do root=$(dirname "$root"); done
if [ ! -e "$root/slurm/common.sh" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    original=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=\(.*\/slurm\/[a-z]*\.sh\).*/\1/p' | head -n 1)
    root=$(dirname "$(dirname "$original")")
fi
if [ ! -e "$root/slurm/common.sh" ]; then
    echo "error: the repository is not found from ${SLURM_SUBMIT_DIR:-$PWD}; set HPC_ROOT to its folder" >&2
    exit 2
fi
. "$root/slurm/common.sh"
# Slurm's warning must not end Python before Python listens.
trap '' USR1
exec "$python" "$root/launch/on_slurm.py" "$@"
