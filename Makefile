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

.PHONY: help quickstart check test test-slow smoke gpu wheels dist
help:
	@echo "make quickstart  train a tiny model to reconstruct rooms and answer questions, score it, write a report (CPU, about 15 minutes)"
	@echo "make test        the test suite (CPU, offline after installation)"
	@echo "make check       lint, format and types"
	@echo "make smoke       the commands of the README on tiny inputs"
	@echo "make test-slow   the long tests"
	@echo "make gpu         tests and benchmarks that need a CUDA device, without installation (see benchmarks/README.md)"
	@echo "make wheels      packages for make gpu on a machine without network"

.venv/.installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# Without the one thread that suits the tests. ARGS go to train/quickstart.sh.
quickstart: $(ENVIRONMENT)
	env -u OMP_NUM_THREADS PYTHON="$(PY)" bash train/quickstart.sh $(ARGS)

check: $(ENVIRONMENT)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m basedpyright --pythonpath "$$($(PY) -c 'import sys; print(sys.executable)')"

test: $(ENVIRONMENT)
	$(PY) -m pytest -n 2 --dist loadgroup

test-slow: $(ENVIRONMENT)
	$(PY) -m pytest -n 2 --dist loadgroup -m slow

smoke: $(ENVIRONMENT)
	PY="$(PY)" bash tests/smoke.sh

# Needs no environment and no network: $(PYTHON) with torch and transformers, and .whl/ for what else is missing there.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

GPU_WHEELS := jsonargparse roma timm trimesh
WHEEL_PLATFORMS := manylinux_2_28_x86_64 manylinux_2_27_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64 manylinux1_x86_64
wheels:
	rm -rf .whl
	$(PYTHON) -m pip download --quiet --dest .whl --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		$(addprefix --platform ,$(WHEEL_PLATFORMS)) -c constraints.txt $(GPU_WHEELS)

dist: $(ENVIRONMENT)
	$(PY) -m pip wheel --quiet --no-deps -w dist .
