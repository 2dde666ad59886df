# Every target builds the virtual environment that it needs, and again when pyproject.toml or constraints.txt changes.
#   make train ARGS="--help"      options of the training run
#   make test  ARGS="-k readme"   options of pytest
#   make ... PYTHON=python3.12 VENV=/somewhere/else

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check

.PHONY: train test test-kernels test-tritons test-others test-oldest-torch soak bench lint types

# The rates and epochs are those with the lowest loss that two minutes on two cores bought (docs/results.md).
train: $(VENV)/.installed
	$(BIN)/patchkernels train --lr 6e-3 --decay 0.2 $(if $(findstring --tokens,$(ARGS)),,--epochs 2) $(ARGS)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -p no:benchmark --numprocesses 2 --dist worksteal $(ARGS)

# The operators' tests again, on kernels that are compiled for a GPU and executed as PTX (docs/ptx-machine.md).
# test_backend.py is left out: it is about the variable that turns the interpreter on.
MACHINE = OMP_NUM_THREADS=1 $(BIN)/pytest -p no:benchmark --numprocesses 2 --dist worksteal

test-kernels: $(VENV)/.installed-dev
	PTX_MACHINE=90 $(MACHINE) tests/ops tests/kernels tests/ptx_machine tests/soak --ignore tests/ops/test_backend.py $(ARGS)
	PTX_MACHINE=80 $(MACHINE) tests/ops/test_patch_cross_entropy.py tests/ops/test_patch_embedding.py $(ARGS)
	PTX_MACHINE=100 PTX_ORDER=random $(MACHINE) tests/ops/test_patch_cross_entropy.py tests/ops/test_patch_embedding.py \
		$(ARGS)

# The kernels as an older and the newest Triton compile them. Of the builds that test-kernels compiles, this compiles a
# part; BUILDS_STRENGTH=2 is all of them, and 3 many more, which takes hours.
TRITONS = 3.6.0 3.9.0
BUILDS_STRENGTH ?= 1

test-tritons: $(addprefix test-triton-,$(TRITONS))

test-triton-%: $(VENV)/.installed-dev
	$(PIP) install --quiet --upgrade --no-deps --target $(OTHERS)/triton-$* triton==$*
	PYTHONPATH=$(OTHERS)/triton-$* PTX_MACHINE=90 BUILDS_STRENGTH=$(BUILDS_STRENGTH) $(MACHINE) \
		tests/kernels/test_configurations.py tests/kernels/test_compiled.py $(ARGS)

# For single tests, installed outside of the environment since they conflict with it: the oldest transformers that we
# support, the newest, which Python 3.10 does not have, and torchtitan, which excludes our version of datasets.
OLDEST = transformers==5.0.0 accelerate==1.10.0 huggingface-hub==1.33.0 tokenizers==0.22.2 typer-slim==0.24.0 \
	httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18
NEWEST = 'transformers==5.24.0; python_version >= "3.11"'
TORCHTITAN = torchtitan==0.3.0 spmd_types==0.2.3 torchdata==0.11.0 torch_checkpointing==0.1.1 tensorboard==2.21.0 \
	absl-py==2.5.1 protobuf==7.36.2
OTHERS = $(abspath $(VENV))-others

test-others: $(VENV)/.installed-dev
	$(PIP) install --quiet --upgrade --no-deps --target $(OTHERS)/oldest $(OLDEST)
	$(PIP) install --quiet --upgrade --no-deps --target $(OTHERS)/newest $(NEWEST)
	$(PIP) install --quiet --upgrade --no-deps --target $(OTHERS)/torchtitan $(TORCHTITAN)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OTHERS)/oldest $(BIN)/pytest -p no:benchmark --numprocesses 2 \
		tests/hf $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OTHERS)/newest $(BIN)/pytest -p no:benchmark --numprocesses 2 \
		tests/hf/test_trl.py tests/hf/test_trainer.py tests/hf/test_trainer_batches.py tests/hf/test_rows.py \
		tests/hf/test_enable.py tests/hf/test_patch_step.py -k "not processes and not threads" $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OTHERS)/torchtitan $(BIN)/pytest -p no:benchmark --numprocesses 2 \
		tests/test_torchtitan.py $(ARGS)

# The oldest torch that we support, with the triton that it requires (and numpy below 2.4, since that triton's interpreter
# fails with newer ones). That torch comes with CUDA's libraries, 7 GB, so that .ci/run leaves this out.
OLDEST_TORCH = torch==2.10.0 numpy==2.2.6

test-oldest-torch: $(VENV)/.installed-dev
	mkdir -p $(OTHERS)
	grep --invert-match --extended-regexp '^(torch|triton|numpy)==' constraints.txt > $(OTHERS)/constraints.txt
	$(PIP) install --quiet --upgrade --constraint $(OTHERS)/constraints.txt --target $(OTHERS)/torch $(OLDEST_TORCH)
	OMP_NUM_THREADS=1 PYTHONPATH=$(OTHERS)/torch $(BIN)/pytest -p no:benchmark --numprocesses 2 --dist worksteal \
		tests/ops tests/kernels tests/model tests/test_fsdp2.py tests/training/test_distributed.py $(ARGS)

# Random calls of the operators against their definitions in fp64, until one fails or the time is over.
# PTX_MACHINE=90 checks the kernels as they are compiled. ARGS="--case 123" repeats a case, ARGS="--help" has the rest.
SECONDS ?= 3600

soak: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 PYTHONPATH=tests/support:tests/ptx_machine:tests/soak $(BIN)/python -m soak --seconds $(SECONDS) $(ARGS)

# The libraries to compare with are installed by hand: pip install ".[peers]" on a machine with a GPU.
bench: $(VENV)/.installed-dev
	$(BIN)/pytest bench/ --benchmark-only --benchmark-json bench.json $(ARGS)
	$(BIN)/python -m bench.report bench.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# The build backend is installed first, so that it has the pinned version too (--no-build-isolation).
$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "Installing patchkernels into $(VENV), with torch: this takes minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt setuptools
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	touch $@
