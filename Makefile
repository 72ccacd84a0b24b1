# `make quickstart` and `make test` set up what they need; nothing else is asked for but Python 3.11, pip and make.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/.installed
STORE ?= local
# Two files of tests at a time: many of their seconds are spent waiting for processes to start.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup quickstart test test-all prove chaos demo-50k demo-search demo-guidance findings gpu-check cluster cluster-stop lint clean

help:  ## the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(INSTALLED)  ## the virtual environment .venv with the pinned packages

# torch first: a later package must find it there, or it would take another build.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

quickstart: $(INSTALLED)  ## prepare, train, search, generate and evaluate scanned digits; STORE=s3 does it on S3
	$(BIN)/python jobs/quickstart.py digits --storage $(STORE)

test: $(INSTALLED) lint  ## the tests that CI runs
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

test-all: $(INSTALLED) lint  ## every test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

prove: $(INSTALLED)  ## the same weights to the bit, by 1, 2 and 4 workers, through kills, and through resizes
	$(BIN)/python -m tests.chaos.prove --seed $(or $(SEED),0)

chaos: $(INSTALLED)  ## KILLS=20 SEED=0: trainings under random kills, which must change no bit
	$(BIN)/python -m tests.chaos.run --kills $(or $(KILLS),20) --seed $(or $(SEED),0)

demo-50k: $(INSTALLED)  ## SAMPLES=50000 KILLS=10 SEED=0: samples under kills, compared pixel by pixel
	$(BIN)/python -m tests.chaos.demo_50k --samples $(or $(SAMPLES),50000) --kills $(or $(KILLS),10) --seed $(or $(SEED),0)

demo-search: $(INSTALLED)  ## SEED=0: the search beside the full grid, on scanned digits
	$(BIN)/python -m tests.benchmarks.demo_search --seed $(or $(SEED),0)

demo-guidance: $(INSTALLED)  ## every kind of guidance at the same costs, on scanned digits
	$(BIN)/python -m tests.benchmarks.demo_guidance

findings: $(INSTALLED)  ## the papers' findings, looked for on scanned digits
	$(BIN)/python -m tests.benchmarks.findings

gpu-check: $(INSTALLED)  ## what must hold on a GPU, and how fast it is; ARGS=--tiny tries it on a CPU
	$(BIN)/python -m tests.gpu.check $(ARGS)

lint: $(INSTALLED)  ## ruff, mypy, spelling and wording
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python -m tests.prose
	$(BIN)/mypy models orchestrator cluster jobs tests

cluster: $(INSTALLED)  ## a Ray head, two nodes, S3, MLflow, as processes of this machine
	@$(BIN)/python -m cluster.local start

cluster-stop: $(INSTALLED)  ## end exactly what `make cluster` started
	@$(BIN)/python -m cluster.local stop

clean:  ## remove the virtual environment and caches; what was made in runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache build *.egg-info
