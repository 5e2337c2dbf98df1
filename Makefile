# Development commands. Each target that needs the environment creates it first.
# ARGS is passed to pytest (make test ARGS="tests/mcore -x") or to the quickstart.

VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
ARGS ?=
# Test processes in parallel; the tests of a file stay in one process, in order. Each process may start up to 8
# workers of 0.8 GB.
JOBS ?= 2
PYTEST = $(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# tools/setup.sh reads PYTHON and TORCH_INDEX_URL from the environment.
export VENV
# Without it every process of a test compiles the package anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# How long `make fuzz` runs.
MINUTES ?= 10
# Seconds that `make gpu` may take.
BUDGET_S ?= 540

.PHONY: help setup quickstart quickstart-sdpo test test-all fuzz gpu check docs format clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## find a Python, create .venv and install into it (no-op when current)
	@tools/setup.sh

quickstart: setup ## train a small real model on two CPU processes and compare before and after (minutes)
	$(PYTHON_IN_VENV) tools/quickstart.py $(ARGS)

quickstart-sdpo: setup ## the same as stepwise DPO: two steps, the first result is the second reference
	$(PYTHON_IN_VENV) tools/quickstart.py examples/quickstart_sdpo.yaml $(ARGS)

test: setup ## all CPU tests except the exhaustive ones
	$(PYTEST) -m "not exhaustive and not gpu" $(ARGS)

test-all: setup ## all CPU tests, including the full matrices
	$(PYTEST) -m "not gpu" $(ARGS)

fuzz: setup ## random configurations, records, templates, damage and kill points for MINUTES=10
	$(PYTHON_IN_VENV) tools/fuzz.py --minutes $(MINUTES) $(ARGS)

gpu: setup ## what only a GPU can prove, the most valuable first, within BUDGET_S=540; again to continue
	$(PYTHON_IN_VENV) tools/gpu.py --budget-s $(BUDGET_S) $(ARGS)

check: setup ## lint, formatting, strict types, house rules
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) tools/house_rules.py

docs: ## build the documentation site into build/site; an environment apart, no torch
	@tools/docs.sh $(ARGS)

format: setup ## apply ruff's fixes and formatting
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

clean: ## remove caches and build products (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
