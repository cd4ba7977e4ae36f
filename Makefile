# fourmill: every target sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help demo test test-long check bench bench-labelers clean setup
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 27

setup: $(STAMP) ## make the virtual environment

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP) ## run the main job on rendered scenes: nothing to download, no account, no GPU
	$(BIN)/fourmill demo

test: $(STAMP) ## run the tests (about 9 minutes on 2 cores)
	$(BIN)/pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m "not long" --durations=10

test-long: $(STAMP) ## run every test
	$(BIN)/pytest -q

check: $(STAMP) ## lint and type-check
	test ! -e tokenize/__init__.py
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

bench: $(STAMP) ## run the benchmarks
	for script in $$(grep -l '^if __name__' benchmarks/*.py); do $(BIN)/python $$script || exit 1; done

bench-labelers: $(STAMP) ## accuracy of the specialists on held-out scenes, into their cards; speed of labelers
	$(BIN)/python -m fourmill.flows.specialists.remeasure depth normal semseg det clip
	$(BIN)/python benchmarks/labelers.py --quick

clean: ## remove the environment and what the demo made
	rm -rf $(VENV) data/demo runs/demo build *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
