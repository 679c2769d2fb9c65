# Each target installs requirements.lock into .venv if .venv is missing or older than the lock, with uv if it is
# installed, otherwise with pip.
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
	@echo "make quickstart     run the whole loop on this machine: tune, evaluate, register (no GPU, network or server)"
	@echo "make search         search anchor/query splits on a supernet, and cluster counts (about twenty minutes)"
	@echo "make ui             start MLflow on http://127.0.0.1:$(PORT) for the runs in runs/ (PORT=... for another port)"
	@echo "make test           run the tests (no GPU needed; about twelve minutes on two cores)"
	@echo "make test-all       run all tests, also the nightly ones: long benches, repeated kills, whole pipelines"
	@echo "make test-fast      run only the quick tests without a cluster or a server"
	@echo "make test-portable  run the tests without a cluster under other CPU instruction sets and thread counts"
	@echo "make check          check format, lint rules, types, and the text of Markdown and job files"
	@echo "make clean          remove .venv and the caches of the tools; runs/ is kept"

# uv does not read the configuration of pip, so a local folder of wheels (for example a CPU build of torch) is passed to
# it.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info < (3, 11) and sys.exit("parcelray needs Python 3.11 or newer, this is " \
	  + sys.version.split()[0] + "; set PYTHON=...")'
	@if command -v uv >/dev/null; then \
	  echo "Installing requirements.lock into .venv with uv"; \
	  uv venv --quiet --allow-existing --python "$(PYTHON)" .venv; \
	  flags=(); \
	  links="$${PIP_FIND_LINKS:-$$($(PYTHON) -m pip config get global.find-links 2>/dev/null || true)}"; \
	  for link in $$links; do flags+=(--find-links "$$link"); done; \
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

# Instruction sets of oneDNN and of PyTorch's own kernels, each with one and with two threads.
test-portable: $(INSTALLED)
	@failed=(); \
	for isa in ONEDNN_MAX_CPU_ISA=AVX512_CORE ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2; do \
	  for threads in 1 2; do \
	    echo "Running the tests without a cluster under $$isa with $$threads threads"; \
	    env "$$isa" PARCELRAY_TEST_THREADS=$$threads $(PY) -m pytest -q -n $$((2 / threads)) --dist loadscope \
	      --no-loadscope-reorder --durations=0 --durations-min=10 \
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
	@echo "Checking the text of Markdown and job files"
	@$(PY) -m pytest -q --durations=0 --durations-min=10 tests/house/test_texts.py tests/house/test_architecture.py

# One worker and no job execution: two processes instead of thirteen, and no HTTP route that executes code.
ui: $(INSTALLED)
	@mkdir -p runs
	@echo "MLflow with runs/mlflow.db on http://127.0.0.1:$(PORT); press Ctrl-C to stop it"
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false $(PY) -m mlflow server \
	  --backend-store-uri sqlite:///runs/mlflow.db --artifacts-destination runs/artifacts \
	  --host 127.0.0.1 --port $(PORT) --workers 1

clean:
	@echo "Removing .venv and the caches of the tools"
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
