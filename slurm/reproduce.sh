#!/usr/bin/env bash
#SBATCH --job-name=hpc-reproduce
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

# The paper's tables, one task of the array for each; flags are those of launch/reproduce.py:
#
#   sbatch slurm/reproduce.sh --preset small
#   sbatch --array=1 slurm/reproduce.sh        one table only
#   sbatch --gres=gpu:1 --time=24:00:00 slurm/reproduce.sh --preset paper --data_dir data
#   sbatch --array=0 slurm/reproduce.sh --preset paper --tasks rte cb --seeds 0      a part of a table
#
# 180 s before the time limit the run under way is told to write a checkpoint. Submitted again, with the same flags, the
# table goes on from there; what is done is not done again, and tasks of several arrays share what is left.
set -euo pipefail

# The one place that says which index is which table; --array above leaves out efficiency, which is measured anew each
# time.
tables=(table1 table2 table3 table4 table5 efficiency)

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
index=${SLURM_ARRAY_TASK_ID:-}
if [ -z "$index" ] || [ -z "${tables[$index]:-}" ]; then
    echo "error: SLURM_ARRAY_TASK_ID is '$index'; submit with sbatch --array=0-$((${#tables[@]} - 1)) slurm/reproduce.sh" >&2
    exit 2
fi
if [ ! -e "$root/launch/reproduce.py" ]; then
    echo "error: $root has no launch/reproduce.py, so there is nothing to reproduce ${tables[$index]} with" >&2
    exit 2
fi
exec "$python" "$root/launch/reproduce.py" "${tables[$index]}" "$@"
