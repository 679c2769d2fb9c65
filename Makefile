# Each target makes .venv from requirements.lock if it is missing or older than the lock: with uv where it is installed, with pip where not.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart search test test-all test-fast test-portable check ui clean

PYTHON ?= python3
PORT ?= 5000
PY := .venv/bin/python
INSTALLED := .venv/.installed
CLUSTER := ray or serving or browser

help:
	@echo "make quickstart  the whole loop on this machine: train, evaluate, report (no GPU, no network, no server)"
	@echo "make search      the split of every budget on a supernet, and the cluster count (about twenty minutes)"
	@echo "make test        the tests (no GPU needed): about twelve minutes on two cores"
	@echo "make test-all    also the nightly tests: long benches, repeated kills, whole pipelines"
	@echo "make test-fast   only the quick tests without a cluster or a server"
	@echo "make test-portable  the tests without a cluster, under other CPU instruction sets and thread counts"
	@echo "make check       ruff format, ruff lint, mypy --strict"
	@echo "make ui          MLflow on http://127.0.0.1:$(PORT), over the runs in runs/ (PORT=... for another port)"
	@echo "make clean       removes .venv and the tools' caches; runs/ stays"

# uv does not read pip's configuration, so a local folder of wheels (for example a CPU build of torch) is passed on to it.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("parcelray needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=...") if sys.version_info < (3, 11) else None'
	@if command -v uv >/dev/null; then \
	  echo "Installing requirements.lock into .venv with uv"; \
	  uv venv --quiet --allow-existing --python "$(PYTHON)" .venv; \
	  flags=(); \
	  for place in $${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null || true)}; do flags+=(--find-links "$$place"); done; \
	  uv pip install --quiet --python $(PY) "$${flags[@]}" -r requirements.lock; \
	  uv pip install --quiet --python $(PY) --no-deps --no-build-isolation -e .; \
	else \
	  echo "Installing requirements.lock into .venv with pip (some minutes)"; \
	  $(PYTHON) -m venv .venv; \
	  $(PY) -m pip install -qq --disable-pip-version-check -r requirements.lock; \
	  $(PY) -m pip install -qq --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
	@touch $@

quickstart: $(INSTALLED)
	@echo "Running pipelines/quickstart.py"
	@$(PY) pipelines/quickstart.py

search: $(INSTALLED)
	@echo "Running pipelines/search.py"
	@$(PY) pipelines/search.py

test: $(INSTALLED)
	@$(PY) tests/run_all.py

test-all: $(INSTALLED)
	@$(PY) tests/run_all.py --nightly

test-fast: $(INSTALLED)
	@$(PY) -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not (gpu or nightly or slow or $(CLUSTER))"

# The instruction sets of oneDNN and of PyTorch's own kernels, each with one and with two threads.
test-portable: $(INSTALLED)
	@failed=(); \
	for isa in ONEDNN_MAX_CPU_ISA=AVX512_CORE ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2; do \
	  for threads in 1 2; do \
	    echo "Running the tests without a cluster under $$isa with $$threads threads"; \
	    env "$$isa" PARCELRAY_TEST_THREADS=$$threads $(PY) -m pytest -q -n $$((2 / threads)) --dist loadscope --no-loadscope-reorder --durations=0 --durations-min=10 \
	      -m "not (gpu or nightly or $(CLUSTER))" || failed+=("$$isa with $$threads threads"); \
	  done; \
	done; \
	if [ "$${#failed[@]}" -gt 0 ]; then printf 'FAILED: %s\n' "$${failed[@]}"; exit 1; fi; \
	echo "All six settings passed."

check: $(INSTALLED)
	@echo "Checking the format"
	@$(PY) -m ruff format --check .
	@echo "Checking the rules"
	@$(PY) -m ruff check .
	@echo "Checking the types"
	@$(PY) -m mypy

# One worker and no job execution: two processes instead of thirteen, and no route that runs code.
ui: $(INSTALLED)
	@mkdir -p runs
	@echo "MLflow on http://127.0.0.1:$(PORT) over runs/mlflow.db; Ctrl-C stops it"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server --backend-store-uri sqlite:///runs/mlflow.db --artifacts-destination runs/artifacts \
	  --host 127.0.0.1 --port $(PORT) --workers 1

clean:
	@echo "Removing .venv and the tools' caches"
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
