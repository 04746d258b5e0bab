# Commands for users and CI. Every target first runs launch/setup.sh, which ends at once if nothing has changed.
#   make demo ARGS="steps=5 tracking.wandb=false"     with any overrides of the recipe
#   make setup GPU=1                                  installs the packages for NVIDIA GPUs instead of those for CPUs
#   make setup PYTHON=/path/to/python3.12             uses this interpreter instead of the one that is found

ARGS ?=
GPU ?=

PYTEST = .venv/bin/python -m pytest
FAST = $(PYTEST) -m "not e2e" --numprocesses 2 --dist loadfile

# Several processes import the same large packages, so the bytecode that the first one compiles must be kept.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test fast lint docs lock clean

help:
	@echo "make demo    train the coding agent from scratch on this machine (ARGS=...: overrides)"
	@echo "make test    run lint, type checks and all tests; tests with real engines run last"
	@echo "make fast    run lint, type checks and the tests that start no engine"
	@echo "make lint    run ruff and mypy"
	@echo "make docs    build the documentation site in site/ and check its links"
	@echo "make setup   install the packages into .venv (GPU=1: for NVIDIA GPUs)"
	@echo "make lock    resolve locks/*.in into locks/*.txt (ARGS=--upgrade: the newest versions)"
	@echo "make clean   delete .venv and everything built or cached here; runs/ is kept"

setup:
	@GPU="$(GPU)" bash launch/setup.sh

demo: setup
	.venv/bin/slime train recipe=ppo_coding $(ARGS)

# Tests that start engines or several processes run last, one at a time.
test: setup lint
ifeq ($(strip $(ARGS)),)
	$(FAST)
	$(PYTEST) -m e2e
else
	$(PYTEST) $(ARGS)
endif

fast: setup lint
	$(FAST) $(ARGS)

lint: setup
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

docs: setup
	@.venv/bin/python docs/build.py

lock: setup
	bash locks/remake.sh $(ARGS)

clean:
	rm -rf .venv .cache site .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
