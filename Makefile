# Two commands set everything up after a clone: `make quickstart` and `make test`. Each target makes `.venv` on first use.
# An active environment is used instead when this checkout is installed in it (pip install -e '.[dev]').
SHELL := /bin/bash
PYTHON ?= python3
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

INSTALLED_HERE := import importlib.util as u, pytest; s = u.find_spec("g2vlm"); raise SystemExit(not (s and s.origin.startswith("$(CURDIR)/")))
ACTIVE := $(shell $(PYTHON) -I -c '$(INSTALLED_HERE)' 2>/dev/null && echo yes)
ifeq ($(ACTIVE),yes)
PY := $(PYTHON)
ENVIRONMENT :=
else
PY := .venv/bin/python
ENVIRONMENT := .venv/.installed
endif

.PHONY: help check test test-slow smoke gpu dist
help:
	@echo "make test        the test suite (CPU, offline after installation)"
	@echo "make check       lint, format and types"
	@echo "make smoke       the commands of the README on tiny inputs"
	@echo "make test-slow   the long tests"
	@echo "make gpu         tests and benchmarks that need a CUDA device"

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

check: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

test: $(ENVIRONMENT)
	$(PY) -m pytest -n 2

test-slow: $(ENVIRONMENT)
	$(PY) -m pytest -n 2 -m slow

smoke: $(ENVIRONMENT)
	PY="$(PY)" bash tests/smoke.sh

gpu: $(ENVIRONMENT)
	$(PY) -m benchmarks.gpu

dist: $(ENVIRONMENT)
	$(PY) -m pip wheel --quiet --no-deps -w dist .
