# For the scripts beside this one, which set `root`: the site's own settings, then the Python to run.
site=${HPC_SITE:-$root/slurm/site.sh}
if [ -e "$site" ]; then
    . "$site"
elif [ -n "${HPC_SITE:-}" ]; then
    echo "error: HPC_SITE is $site, which does not exist; see slurm/site.sh.example" >&2
    exit 2
fi
if [ -n "${HPC_PYTHON:-}" ]; then
    python=$HPC_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
if ! command -v "$python" >/dev/null; then
    echo "error: there is no Python at $python; run make in $root, or set HPC_PYTHON" >&2
    exit 2
fi
