# make quickstart   train, validate, resume, export and generate on the embedded default (a few minutes on 2 cores)
# make test         all tests that need no GPU; WORKERS=1: one after the other
# make check        format, lint, types and house rules
# make setup        .venv and the embedded default; TORCH=keep|cpu|VERSION, PYTHON=python3.12
# make test-all     the longer sweeps too
# make faults       whole runs with faults in them: ROUNDS=200 SEED=1 (CONTRIBUTING.md)
# make mutants      hand-made faults, and whether the tests catch each: WORKERS=2 (CONTRIBUTING.md)
# make gpu-test     tests that need a GPU, with the machine's own torch

PYTHON ?= python3
ROUNDS ?= 200
TORCH ?= keep
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --no-loadscope-reorder
BIN := .venv/bin

.PHONY: quickstart test test-all faults mutants check setup gpu-test clean

quickstart: setup
	$(BIN)/python tools/quickstart.py

test: setup
	$(PYTEST) -m "not gpu and not slow" tests

test-all: setup
	$(PYTEST) -m "not gpu" tests

faults: setup
	CUTS=500 $(BIN)/python -m pytest tests/faults
	$(BIN)/python -m tests.faults --rounds $(ROUNDS) $(if $(SEED),--seed $(SEED))

mutants: setup
	$(BIN)/python -m tests.mutants --workers $(WORKERS) $(if $(ONLY),--only $(ONLY))

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/house

setup:
	@$(PYTHON) tools/setup_environment.py --torch $(TORCH)

# The machine's own Python: a GPU machine has its own torch, and .venv need not exist there.
gpu-test:
	$(PYTHON) -m pytest -m gpu tests/gpu

clean:
	rm -rf .venv embedded runs *.egg-info .mypy_cache .ruff_cache
