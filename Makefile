# Everything a newcomer needs; `make` alone lists it. Debian: apt-get install python3-venv make
#
#   PYTHON=python3.12   the interpreter the environment is made with (default: the first of 3.11 to 3.13 found)
#   VENV=.venv          where the environment lies
#   WORKERS=2           processes of `make test`; each holds torch and DeepSpeed, about 1 GB

VENV ?= .venv
WORKERS ?= 2
PYTHON ?=
BIN := $(VENV)/bin
SOURCES := pyproject.toml constraints.txt setup.py $(wildcard data_pipelines/native/*.[ch] data_pipelines/*/native/*.[ch])
BENCHMARKS := $(filter-out tests/bench/_% tests/bench/conftest.py tests/bench/streaming.py,$(wildcard tests/bench/*.py))
SCRIPTS := .ci/run $(wildcard slurm/*.sbatch)

.DEFAULT_GOAL := help
.PHONY: help demo test test-cluster test-cluster-core bench gpu soak lint format constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed ## built-in images -> shards -> a pretrained encoder -> its probe, on any laptop
	$(BIN)/selfsight demo

test: $(VENV)/.installed-dev ## the test suite (minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-cluster: $(VENV)/.installed-dev ## the tests on a real SLURM cluster of three nodes on this machine (slurm-wlm munge)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m cluster tests/cluster

test-cluster-core: $(VENV)/.installed-dev ## those of them that CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "cluster and not cluster_full" tests/cluster

bench: $(VENV)/.installed-dev ## the benchmarks, one after the other; each prints both sides and the ratio
	@set -e; for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python $$script; done

gpu: $(VENV)/.installed-dev ## what a CPU can't measure, on one GPU in eight minutes (tests/gpu/README.md)
	$(BIN)/python tests/gpu/kit.py

soak: $(VENV)/.installed-dev ## half an hour of streaming; fails if its memory grows
	$(BIN)/python tests/bench/streaming.py

lint: $(VENV)/.installed-dev ## ruff, mypy and (where installed) shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck $(SCRIPTS); else echo "shellcheck is not installed: scripts not checked"; fi

format: $(VENV)/.installed-dev ## rewrite the code as ruff wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: | $(BIN)/python ## freeze the newest releases that pyproject.toml allows into constraints.txt
	$(BIN)/python -m venv build/constraints
	build/constraints/bin/pip install --quiet --upgrade ".[dev]"
	sed -n '/^#/p' constraints.txt > build/constraints.txt
	build/constraints/bin/pip freeze --all --exclude pip --exclude selfsight \
	  | sed 's/.*/\L&/; s/_/-/g' | LC_ALL=C sort -t= -k1,1 >> build/constraints.txt
	mv build/constraints.txt constraints.txt
	rm -rf build/constraints

clean: ## remove the environment, the demo and all caches (your runs/ stay)
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is made once and installed into again when the stamp is older than what it was made from.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(VENV)/.installed

$(BIN)/python:
	@set -e; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then \
	    if ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
	      echo "error: $$python has no venv module; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; \
	    fi; \
	    echo "making $(VENV) with $$($$python --version); the first installation fetches several GB"; \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "error: no Python from 3.11 to 3.13 among: $(or $(PYTHON),python3 python3.13 python3.12 python3.11);" \
	  "install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2
