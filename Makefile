# make quickstart [DATA=path/to/train.jsonl]   train a little, from nothing
# make test | lint | types | docs
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := configs/quickstart.yaml

.PHONY: quickstart test lint types docs clean

# Only as new as what it was made from: a second run installs nothing.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

quickstart: $(VENV)/installed
	@echo "model: $$($(BIN)/python -m thinktuning.policy.embedded)"
	$(BIN)/thinktuning fit --config $(QUICKSTART) $(if $(DATA),--data.source "$(DATA)")

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/mypy

# The manual, one page per subcommand, straight from the docstrings.
docs: $(VENV)/installed
	mkdir -p build/manual
	for command in fit validate test; do \
		COLUMNS=100 $(BIN)/thinktuning $$command --help > build/manual/$$command.txt || exit 1; \
	done
	COLUMNS=100 $(BIN)/thinktuning export --help > build/manual/export.txt

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
