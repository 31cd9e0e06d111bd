#!/usr/bin/env bash
#SBATCH --job-name=hpc-bench
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --output=slurm-%j.out

# A benchmark on one node, all roles of it on that node:
#
#   sbatch --exclusive slurm/bench.sh SUITE [flags of launch/bench.py]
#
# Figures of a node that others use at the same time say little, hence --exclusive.
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
exec "$python" "$root/launch/bench.py" "$@"
