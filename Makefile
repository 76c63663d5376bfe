# `make` alone lists the targets. Needs Python 3.11 to 3.13 and nothing else: everything goes into $(VENV).
VENV ?= .venv
DEMO ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST := $(BIN)/python -m pytest

# The first of these that is fit; `make PYTHON=/path/to/python3.12 ...` takes that one instead.
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python)
FIT := import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))

# What `make test` leaves to `make test-all`
ELSEWHERE := slow or gpu or slurm or ray or s3 or gs

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo install lint test test-fast test-slow test-all test-slurm bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.core ## shard, train, kill -9, resume elsewhere, evaluate, compare (a few minutes)
	@$(BIN)/mixer demo $(DEMO)

install: $(VENV)/.dev ## the virtual environment, with all that the tests need

test: lint test-fast ## lint and the tests that need nothing special (under 10 minutes)

test-all: test test-slow ## all tests; those that lack a GPU, SLURM, ... skip and say so

lint: $(VENV)/.dev ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test-fast: $(VENV)/.dev
	$(PYTEST) -m "not ($(ELSEWHERE))" $(PYTEST_ARGS)

test-slow: $(VENV)/.dev
	$(PYTEST) -m "$(ELSEWHERE)" $(PYTEST_ARGS)

test-slurm: $(VENV)/.dev ## the tests on a real SLURM, which they start themselves (root; a quarter of an hour)
	@bash tests/slurm/cluster.sh install
	$(PYTEST) -m slurm tests/slurm $(PYTEST_ARGS)

bench: $(VENV)/.dev ## side-by-side measurements
	@set -e; found=; for file in benchmarks/*.py; do \
	  [ -e "$$file" ] || continue; found=1; echo "== $$file"; $(BIN)/python "$$file"; \
	done; [ -n "$$found" ] || echo "no benchmarks yet"

clean: ## remove the virtual environment, the demo's folder and caches
	rm -rf .venv demo build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if "$$python" -c '$(FIT)' >/dev/null 2>&1; then fit=$$python; break; fi; \
	done; \
	if [ -z "$$fit" ]; then \
	  echo "make: no fit Python among: $(PYTHONS)." >&2; \
	  echo "It takes 3.11, 3.12 or 3.13 with its venv module (Debian, Ubuntu: apt install python3-venv)." >&2; \
	  echo "If it is elsewhere: make PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$fit"; rm -f $(VENV)/.core $(VENV)/.dev; "$$fit" -m venv $(VENV)

# Stamps: pip runs again only when what it reads has changed.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (a minute or a few, once)"
	@$(PIP) install -qq -c constraints.txt -e '.[demo]'
	@touch $@

# timm and torchvision without their dependencies, which would pull in another torch; all others are there already
$(VENV)/.dev: $(VENV)/.core
	@echo "installing what the tests need"
	@$(PIP) install -qq -c constraints.txt -e '.[demo,dev,ray,s3,gs,region]'
	@$(PIP) install -qq -c constraints.txt --no-deps timm torchvision
	@$(BIN)/python -c 'from pipeline.model.timm_compat import import_timm; import_timm()'
	@touch $@
