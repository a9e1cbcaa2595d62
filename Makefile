# Needs python3 (3.11 or newer) and make; everything else is set up by the targets themselves.
#
#   make serve                        install, then serve the embedded model on port 8000
#   make serve ARGS="./MODEL --port 9000"
#   make test ARGS="tests/engine -x"
#   make help

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

INSTALL_INPUTS := pyproject.toml setup.py constraints.txt tools/install.py $(wildcard src/penstock/execution/kernels/csrc/*)
# Packages that the service tests start as real servers. Only apt-based systems.
SYSTEM_PACKAGES := prometheus redis-server postgresql

.DEFAULT_GOAL := help
.PHONY: help install serve test test-all lint format docs native system-deps clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## *(.*)/  make \1\t\2/' | expand -t 22

install: $(VENV)/.installed  ## Create .venv and install Penstock with what `penstock serve` needs

serve: $(VENV)/.installed  ## Serve the embedded model on port 8000 (ARGS="MODEL --flags" for another)
	@exec $(BIN)/penstock serve $(ARGS)

test: $(VENV)/.installed-dev  ## Run the default test suite (fast, no GPU, no system package needed)
	@exec $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

test-all: $(VENV)/.installed-dev  ## Run the slow tests as well
	@exec $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m 'not gpu' $(ARGS)

lint: $(VENV)/.installed-dev  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## Format the code and sort imports
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev  ## Write the documentation pages that are generated from code
	$(BIN)/python -m penstock.cli.reference > docs/configuration.md
	$(BIN)/python -m penstock.telemetry.docs > docs/metrics.md

native: $(VENV)/.installed  ## Build the native CPU kernels again (after a change in csrc/)
	$(BIN)/python setup.py build_ext --inplace

system-deps:  ## Install the servers that service tests use (apt, as root or with sudo)
	@if ! command -v apt-get >/dev/null; then \
	    echo "system-deps: no apt-get here; install $(SYSTEM_PACKAGES) with your package manager. Tests that need them are skipped otherwise."; \
	    exit 0; \
	fi; \
	missing=""; \
	for package in $(SYSTEM_PACKAGES); do \
	    dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'install ok installed' || missing="$$missing $$package"; \
	done; \
	if [ -z "$$missing" ]; then echo "system-deps: $(SYSTEM_PACKAGES) are installed already."; exit 0; fi; \
	if [ "$$(id -u)" -eq 0 ]; then sudo=""; \
	elif command -v sudo >/dev/null; then sudo="sudo"; \
	else echo "system-deps: run as root, or install sudo, to install:$$missing" >&2; exit 1; fi; \
	echo "system-deps: installing$$missing with apt-get."; \
	$$sudo apt-get update -qq && \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null && \
	echo "system-deps: done."

clean:  ## Remove .venv, caches and build output
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/penstock/execution/kernels/_native.so

$(VENV)/.installed: $(INSTALL_INPUTS)
	@$(PYTHON) tools/install.py --venv $(VENV) --extras server
	@touch $@

$(VENV)/.installed-dev: $(INSTALL_INPUTS)
	@$(PYTHON) tools/install.py --venv $(VENV) --extras server,verify,dev
	@touch $@ $(VENV)/.installed
