# Everything from a fresh clone, with Python >= 3.11 and make only.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: install demo test test-slow test-real lint clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@echo "installing into .venv: torch and what it needs, about 6 GB, four minutes and more"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

demo: install
	$(BIN)/sukashi demo --out runs/demo

PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not realdata and not slow"

test-slow: install
	$(PYTEST) -m "slow and not realdata"

test-real: install
	$(BIN)/python -m pytest -q -m realdata

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
