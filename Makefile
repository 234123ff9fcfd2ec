# `make demo` and `make test` do everything on a fresh machine: they make .venv, install the pinned dependencies and
# build the package with its compiled ops. Both are safe to run again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Everything a rebuild of the package depends on; Python files do not, because the install is editable.
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
CSRC := $(filter %.cpp %.cu %.cuh %.h,$(SOURCES)) $(wildcard tests/cuda_on_cpu/*/*.h tests/cuda_on_cpu/*/*.cpp)

# Tests of a file run in one process, as what they share is made once; the longest files begin (tests/conftest.py).
IN_PARALLEL := -n auto --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help env demo test test-all tests test-fast docs lint format wheel wheel-test cluster cuda-on-cpu triton-build \
	planted-bugs reliability soak chaos gpu-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

demo: env  ## run everything end to end on synthetic pictures and write runs/demo/report.html
	@$(BIN)/sendvae demo $(ARGS)

test: env $(VENV)/.docs $(VENV)/.play  ## lint, and beside it the whole test suite, a process per core
	@$(MAKE) --no-print-directory -j 2 lint tests

# tests/everything.py says what that is. CI does it every night.
test-all: export SENDVAE_TESTS := all
test-all: test  ## `make test` and what it leaves out: every cell of matrices whose thin form it runs (hours)

tests: env
	$(BIN)/python -m pytest $(IN_PARALLEL) $(ARGS)

test-fast: env  ## the tests of single parts: no training, no second process, no compiler
	$(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow" --ignore=tests/gpu $(ARGS)

lint: env  ## ruff, clang-format and pyright; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	$(BIN)/pyright

format: env  ## write Python and C++ as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

docs: $(VENV)/.docs  ## build the documentation as an offline site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The libraries of one wheel load under any torch from 2.10 on. CUDACXX=/usr/local/cuda-12.8/bin/nvcc builds for the
# drivers of CUDA 12, SENDVAE_CUDA_ARCHITECTURES for fewer GPUs; the file's name has the CUDA version (1cu130, 1cpu).
wheel: env  ## a wheel for this Python, made from a source distribution, both in dist/; fails where the ops do not build
	rm -rf dist
	SENDVAE_BUILD=require $(BIN)/python -m build --no-isolation --outdir dist

# Not part of `make test`: it downloads two versions of PyTorch, several GB.
wheel-test: wheel  ## install that wheel in clean environments, under two versions of torch, and test it there
	SENDVAE_WHEEL=1 $(BIN)/python -m pytest tests/test_wheel.py $(ARGS)

# Not part of `make test`: minutes of processor time, and root for network namespaces and Slurm's daemons.
cluster: env  ## jobs on two hosts (network namespaces): Slurm, torchrun, DeepSpeed's launcher; one host is cut off
	SENDVAE_CLUSTER=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

cuda-on-cpu: env  ## the CUDA kernels on the CPU under checks: every case, in several orders of threads
	SENDVAE_TESTS=all $(BIN)/python -m pytest tests/cuda_on_cpu $(ARGS)

triton-build: env  ## the Triton kernels compiled for every GPU, with every set of constants, and traced with gradients
	SENDVAE_TESTS=all $(BIN)/python -m pytest tests/ops/test_triton_build.py \
		"tests/ops/test_contract.py::test_opcheck" $(ARGS)

planted-bugs: env  ## every bug planted in a CUDA kernel is noticed by the checks
	SENDVAE_TESTS=all $(BIN)/python -m pytest tests/cuda_on_cpu/test_kernels.py -k planted $(ARGS)

# A test that is not run keeps its last counts: TESTS=tests/train/test_soak.py runs some of them alone.
IN_FULL := SENDVAE_TESTS=all SENDVAE_RELIABILITY=1 SENDVAE_RELIABILITY_COUNTS=tests/reliability_counts.json SENDVAE_FUZZ=1000 SENDVAE_SOAK=20000
TESTS = $$($(BIN)/python tests/reliability_page.py --list)
reliability: env  ## kills, faults, damage, a soak in full (hours); writes their counts into docs/reliability.md
	$(IN_FULL) $(BIN)/python -m pytest $(TESTS) $(ARGS); status=$$?; \
		$(BIN)/python tests/reliability_page.py && exit $$status

soak: env  ## 20,000 steps of each stage: memory, Python objects, descriptors and threads stay what they are
	SENDVAE_SOAK=20000 $(BIN)/python -m pytest -s tests/train/test_soak.py $(ARGS)

SECONDS ?= 3600
chaos: env  ## random kills and stops on two ranks for SECONDS=3600: the weights must be those of a run without
	SENDVAE_RELIABILITY=1 SENDVAE_CHAOS_S=$(SECONDS) $(BIN)/python -m pytest -s tests/reliability -k chaos $(ARGS)

env: $(VENV)/.package  ## make .venv, install the pinned dependencies, build the package

# $(call install,what is said,pip's arguments): what pip says goes to a log, which is shown where pip fails.
LOG := $(VENV)/install.log
define install
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "$(1)"
	@DS_BUILD_OPS=0 $(BIN)/python -m pip --disable-pip-version-check install $(2) >$(LOG) 2>&1 || { \
		grep -v "^WARNING: Location" $(LOG) | tail -n 80 >&2; \
		echo "that failed: the lines above, and all of $(LOG), say why. Mend it and run make again: it goes on here." >&2; \
		exit 1; }
endef

$(VENV)/.dependencies: requirements.txt requirements-deepspeed.txt
	$(call install,installing the pinned dependencies (a minute or more; PyTorch is large),-r requirements.txt)
	$(call install,installing DeepSpeed,--no-build-isolation -r requirements-deepspeed.txt)
	@touch $@

$(VENV)/.docs: requirements-docs.txt
	$(call install,installing what builds the documentation,-r requirements-docs.txt)
	@touch $@

$(VENV)/.play: requirements-play.txt $(VENV)/.dependencies
	$(call install,installing what sendvae play needs,--no-deps -r requirements-play.txt)
	@touch $@

$(VENV)/.package: $(VENV)/.dependencies $(SOURCES)
	$(call install,building the compiled ops ($(words $(filter %.cpp %.cu,$(SOURCES))) files on $(shell nproc) cores; minutes the first time),-v --no-build-isolation --no-deps --editable .)
	@grep -o "sendvae_fast: WARNING: .*" $(LOG) | tail -n 1 || true
	@touch $@

# On a machine with a GPU: uses the interpreter that is there (its torch, its CUDA), installs nothing from a network.
gpu-check:  ## build the CUDA ops for this GPU, test and measure them, run a short demo on it, print a table
	$(PYTHON) -m bench.gpu_check $(ARGS)

clean:  ## remove what the build made; .venv and runs stay
	rm -rf build dist site sendvae_fast/_lib *.egg-info .pytest_cache .ruff_cache $(VENV)/.package
