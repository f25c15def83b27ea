# `make help` lists what there is. Everything runs in .venv, made from requirements/*.lock on first use.
SHELL := /bin/bash
VENV ?= .venv
PY := $(VENV)/bin/python
PORT ?= 8000
FLAVOR ?= gpu
# What the tests' engines and the interpreter of Triton kernels need; see patches/vllm_nvfp4/compat.py.
TEST_ENV := TRITON_INTERPRET=1 TRITON_DEFAULT_BACKEND=cpu OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

.PHONY: help env serve test test-fast test-sim test-sim-full test-modelopt test-gpu image test-image lint lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 18

env:  ## make or refresh .venv (Python 3.11 or 3.12, CPU torch, vLLM for CPUs, this package)
	@scripts/setup_env.sh $(VENV)

serve: env  ## a server on :8000 with a small checkpoint made on the spot; prints a curl line that works
	@$(PY) scripts/make_serve.py --port $(PORT)

test: env .conformance/.stamp  ## everything that needs no GPU: lint, types, tests
	@$(MAKE) --no-print-directory lint
	@$(TEST_ENV) $(PY) -m pytest tests/cpu tests/sim -n 2 --dist loadfile --no-loadscope-reorder

test-fast: env  ## tests/cpu without the ones that start an engine
	@$(TEST_ENV) $(PY) -m pytest tests/cpu -m "not engine"

test-sim: env .conformance/.stamp  ## tests/sim: kernels compiled for GPUs, executed from their PTX on this CPU
	@$(TEST_ENV) $(PY) -m pytest tests/sim -n 2 --dist loadfile

test-sim-full: env .conformance/.stamp  ## tests/sim with the nightly sizes
	@$(TEST_ENV) $(PY) -m pytest tests/sim -n 2 --dist loadfile --full

.conformance/.stamp: requirements/conformance-py311.lock requirements/conformance-py312.lock
	@scripts/setup_env.sh .conformance conformance
	@touch $@

test-modelopt: env  ## against NVIDIA ModelOpt itself, in an environment of its own (.venv-modelopt)
	@scripts/setup_env.sh .venv-modelopt modelopt
	@$(TEST_ENV) NVFP4_MODELOPT_PYTHON=$(CURDIR)/.venv-modelopt/bin/python $(PY) -m pytest tests/modelopt

test-gpu:  ## on a machine with an NVIDIA GPU, in its own environment with vLLM for CUDA and this package
	@python3 -m pytest tests/gpu -m "not engine and not parallel"

image:  ## the image, with docker, podman or buildah; FLAVOR=cpu: the one that needs no GPU
	@scripts/image_build.sh $(FLAVOR)

test-image: env  ## builds both flavors with buildah and runs one as a pod would; needs root, buildah, debootstrap
	@$(TEST_ENV) $(PY) -m pytest tests/image

lint: env  ## ruff (format and rules) and mypy
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

lock:  ## resolve requirements/*.in again; needs uv
	@scripts/lock.sh

clean:  ## remove environments and everything made
	rm -rf .venv .venv-modelopt .conformance .work .pytest_cache .mypy_cache .ruff_cache .hypothesis
