# Everything a contributor runs. Each target that needs the environment sets it up by itself.
# ARGS reaches pytest:  make test ARGS="tests/mcore -x"; or the quickstart's configuration.

VENV ?= .venv
PYTHON_IN_VENV := $(VENV)/bin/python
ARGS ?=
# Test processes side by side; a file's tests stay in one, in their order. Each may start up to 8 workers of 0.8 GB.
JOBS ?= 2
PYTEST = $(PYTHON_IN_VENV) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# PYTHON and TORCH_INDEX_URL reach tools/setup.sh through the environment.
export VENV

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-sdpo test test-all check format clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## find a Python, make .venv and install into it (does nothing when it is current)
	@tools/setup.sh

quickstart: setup ## train a real model on two CPU processes and see what came of it (minutes)
	$(PYTHON_IN_VENV) tools/quickstart.py $(ARGS)

quickstart-sdpo: setup ## the same in two steps, the second compared to the first one's result
	$(PYTHON_IN_VENV) tools/quickstart.py examples/quickstart_sdpo.yaml $(ARGS)

test: setup ## every CPU test but the exhaustive ones
	$(PYTEST) -m "not exhaustive and not gpu" $(ARGS)

test-all: setup ## every CPU test, the whole matrices too
	$(PYTEST) -m "not gpu" $(ARGS)

check: setup ## lint, formatting, strict types and the house rules
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy
	$(PYTHON_IN_VENV) tools/house_rules.py

format: setup ## mend what ruff can mend
	$(PYTHON_IN_VENV) -m ruff check --fix .
	$(PYTHON_IN_VENV) -m ruff format .

clean: ## remove caches and build products (not .venv, not runs/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
