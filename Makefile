# `make help` prints what can be made. The first target that needs Python makes .venv, once.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Another build of torch (CUDA, ROCm, the CPU-only one) is chosen from the environment, for example
#   PIP_TORCH_ARGS="--index-url URL" make setup
TORCH ?= torch==2.13.0
PIP_TORCH_ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
PIP := $(BIN)/pip --disable-pip-version-check --no-input install --quiet --progress-bar off
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check format test test-slow demo bench bench-service compose-test proto clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the exact versions of constraints.txt

# torch goes in first and alone: asked for by another package, it may come as another build. Its pin is
# then taken out of the constraints, so that a build chosen through TORCH is kept as it is.
$(READY): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 wanted, got {sys.version}"'
	@echo "making .venv: a few minutes, once"
	$(PYTHON) -m venv .venv
	grep -v '^torch==' constraints.txt > .venv/constraints.txt
	$(PIP) -c .venv/constraints.txt $(PIP_TORCH_ARGS) "$(TORCH)"
	$(PIP) -c .venv/constraints.txt -e '.[eval,dev]'
	@touch $@

check: $(READY) ## lint, formatting, types: what CI runs before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put imports and layout right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: $(READY) ## the tests, in minutes (ARGS="-k channel" passes on to pytest)
	$(PYTEST) $(ARGS)

test-slow: $(READY) ## the long tests too
	$(PYTEST) -m "not gpu" $(ARGS)

demo: $(READY) ## start the four processes, edit a sample, keep serving (ONCE=1: end after the sample)
	$(BIN)/edsc demo $(if $(ONCE),--once)

bench: $(READY) ## time edits through the four processes (ARGS="--edits 20")
	$(BIN)/python -m evaluation.bench $(ARGS)

bench-service: $(READY) ## load, overload, faults: goodput and failures as ratios (ARGS="--only batching")
	$(BIN)/python -m evaluation.bench_service $(ARGS)

compose-test: $(READY) ## docker-compose.yml for real, with podman and podman-compose
	$(PYTEST) -m slow tests/test_edsc_compose.py $(ARGS)

proto: $(READY) ## generate shared/pb from proto/edsc.proto
	$(BIN)/python -m grpc_tools.protoc -Ishared/pb=proto --python_out=. --pyi_out=. \
		--grpc_python_out=. proto/edsc.proto

clean: ## remove .venv and every cache
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
