# Two commands on a fresh machine, set-up included: `make demo` trains and compares, `make test` checks everything.
# Each works in .venv, made as needed. Overridable:
#   make test PYTHON=python3.13 TORCH=torch==2.11.0

PYTHON ?= python3
# One release, so that results can be repeated. Installed first and alone: then nothing else picks another build.
TORCH ?= torch==2.13.0
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The installed package is these files' product; all other Python is used from where it lies.
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt emu_kernels/_version.py \
	$(shell find csrc -type f)

.PHONY: help demo test lint bench clean FORCE
.SECONDARY:

help:
	@echo "make demo | test | lint | bench | clean"

demo: $(VENV)/.installed-trainer
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info emu_kernels/_C.*.so emu_kernels/_cuda.*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted install is done again. This one says what it was made
# with: another PYTHON or TORCH makes the environment anew.
$(VENV)/.torch: FORCE
	@[ "$$(cat $@ 2>/dev/null)" = "$(PYTHON) $(TORCH)" ] || { \
		set -ex; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV); \
		$(PIP) install $(TORCH); \
		echo "$(PYTHON) $(TORCH)" > $@; \
	}

$(VENV)/.installed-%: $(VENV)/.torch $(INPUTS)
	EMU_CUDA_REPORTS='$(CURDIR)/build/ptxas' \
		$(PIP) install --constraint constraints.txt $(firstword $(TORCH)) --editable '.[$*]'
	touch $@
