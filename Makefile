# Every target builds the virtual environment it needs from pyproject.toml and constraints.txt, and only when they changed.
#   make train ARGS="--help"      options of the training run
#   make test  ARGS="-k readme"   options of pytest
#   make ... PYTHON=python3.12 VENV=/somewhere/else

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test bench lint types

train: $(VENV)/.installed
	$(BIN)/patchkernels train $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -p no:benchmark --numprocesses 2 --dist worksteal $(ARGS)

# Peers that are to be compared with are installed beside: pip install ".[peers]" on a machine with a GPU.
bench: $(VENV)/.installed-dev
	$(BIN)/pytest bench/ --benchmark-only --benchmark-json bench.json $(ARGS)
	$(BIN)/python -m bench.report bench.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The build backend is installed first, so that it too has the pinned version (--no-build-isolation).
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing patchkernels into $(VENV), with torch: this takes minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@
