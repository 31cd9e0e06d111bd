#!/usr/bin/env bash
#SBATCH --job-name=hpc-hetjob
#SBATCH --ntasks=1
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
#SBATCH hetjob
#SBATCH --ntasks=2

# One federated run as a heterogeneous job: the trunk in the first component, the clients in the second, each with its
# own partition and resources. Options of the components are separated by a colon:
#
#   sbatch --partition=gpu --gres=gpu:1 : --partition=cpu --ntasks=8 slurm/hetjob.sh --train.clients 8
#
# Everything else is as in slurm/train.sh.
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
