# What a user or CI runs. Every target does its own set-up (launch/setup.sh), which is over at once when nothing changed.
#   make demo ARGS="steps=5 tracking.wandb=false"     any overrides of the recipe
#   make setup GPU=1                                  the packages for NVIDIA GPUs instead of those for CPUs
#   make setup PYTHON=/path/to/python3.12             another interpreter than the one that is found

ARGS ?=
GPU ?=

PYTEST = .venv/bin/python -m pytest
FAST = $(PYTEST) -m "not e2e" --numprocesses 2 --dist loadfile

# Several processes import the same large packages: each must find them compiled by the one before.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup demo test fast lint docs lock clean

help:
	@echo "make demo    train the coding agent on this machine, from nothing to a rising reward (ARGS=... overrides)"
	@echo "make test    lint, types and every test, the ones with real engines last"
	@echo "make fast    lint, types and the tests that start no engine"
	@echo "make lint    ruff and mypy"
	@echo "make docs    build the documentation as a site, links checked, into site/"
	@echo "make setup   packages into .venv (GPU=1: for NVIDIA GPUs)"
	@echo "make lock    resolve locks/*.in again into locks/*.txt (ARGS=--upgrade: the newest versions)"
	@echo "make clean   remove .venv and all that was built or cached here; runs/ stays"

setup:
	@GPU="$(GPU)" bash launch/setup.sh

demo: setup
	.venv/bin/slime train recipe=ppo_coding $(ARGS)

# Tests that start engines or several processes have the machine to themselves.
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
