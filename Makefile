# STIP: every target sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra pip arguments for torch alone, e.g. the CPU or CUDA index that pytorch.org names for your machine.
TORCH_PIP_ARGS ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
MODEL ?= stack/demo_model
PRESET ?= hardened
PROMPT ?=

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup demo test test-long lint bench bench-accuracy bench-protect proto clean
help:
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/.ready ## make the virtual environment with pinned packages

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "STIP needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setting up $(VENV) (torch and transformers among others; a few minutes on a fresh machine)"
	@$(PIP) install -c constraints.txt $(TORCH_PIP_ARGS) torch
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready ## protect a model, start every part, verify, stream an answer, compare with plain
	@$(BIN)/stip-stack demo --model '$(MODEL)' --preset '$(PRESET)' $(if $(PROMPT),--prompt '$(subst ','\'',$(PROMPT))')

test: $(VENV)/.ready ## the whole test suite, under ten minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not long' $(PYTEST_ARGS)

test-long: $(VENV)/.ready ## a seeded soak: hundreds of sessions that join, cancel and leave on every instance
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

lint: $(VENV)/.ready ## ruff, mypy strict, import contracts, generated code up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python protocol/generate.py --check

bench: $(VENV)/.ready ## time per token and time to first token against plain, as ratios; writes docs/benchmarks/
	$(BIN)/python -m benchmarks.latency

bench-accuracy: $(VENV)/.ready ## top-1 agreement and differences over 10,000 samples a family; writes docs/benchmarks/
	$(BIN)/python -m benchmarks.accuracy

bench-protect: $(VENV)/.ready ## protect a LLaMA2-7B-shaped checkpoint (30 GB of disk, half an hour) against copying it
	$(BIN)/python -m benchmarks.protect

proto: $(VENV)/.ready ## generate protocol/stip_protocol/wire from its .proto files
	$(BIN)/python protocol/generate.py

clean: ## remove everything that make made
	rm -rf $(VENV) .run build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
